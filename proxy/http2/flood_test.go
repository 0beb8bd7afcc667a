package http2

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// TestFloods sends what costs more than it carries: each ends its connection with a
// reason of its own, and no other.
func TestFloods(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	for _, c := range []struct {
		why  *Refusal
		send func(r *raw) // a burst; it is repeated until the connection ends
	}{
		{ErrRapidReset, func(r *raw) {
			for range 100 {
				r.get(r.id + 1)
				r.out = appendReset(r.out, r.id+1, Cancel)
				r.id += 2
			}
		}},
		{ErrPingFlood, func(r *raw) {
			for range 50 {
				r.out = appendPing(r.out, 0, []byte("12345678"))
			}
		}},
		{ErrSettingsFlood, func(r *raw) { r.out = appendSettings(r.out, setting{settingWindow, 1000}) }},
		{ErrPriorityFlood, func(r *raw) {
			for range 200 {
				r.out = append(appendHeader(r.out, 5, framePriority, 0, 1), 0, 0, 0, 0, 1)
			}
		}},
		{ErrEmptyFlood, func(r *raw) {
			if r.id == 0 {
				r.id = 1
				r.post(1)
			}
			for range 50 {
				r.data(1, false, nil)
			}
		}},
		{ErrDribble, func(r *raw) {
			for range 200 {
				r.out = appendWindow(r.out, 0, 1)
			}
		}},
		{ErrUnknownFlood, func(r *raw) {
			for range 50 {
				r.out = append(appendHeader(r.out, 1, 0xbb, 0, 0), 'x')
			}
		}},
		{ErrMalformFlood, func(r *raw) {
			for range 100 {
				r.get(r.id+1, "connection", "close")
				r.id += 2
			}
		}},
		{ErrContFlood, func(r *raw) {
			if r.id == 0 {
				r.id = 1
				r.out = appendHeader(r.out, 0, frameHeaders, 0, 1)
			}
			for range 10 {
				r.out = appendHeader(r.out, 0, frameContinuation, 0, 1)
			}
		}},
		{ErrBomb, func(r *raw) {
			// One long field, indexed once and then referred to by one byte each time.
			if r.id == 0 {
				r.id = 1
				b := append([]byte(nil), r.encode(":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.test", "x", strings.Repeat("y", 3900))...)
				b = append(b, bytes.Repeat([]byte{0x80 | 62}, 10000)...)
				r.out = append(appendHeader(r.out, len(b), frameHeaders, flagEndHeaders, 1), b...)
			}
		}},
	} {
		t.Run(c.why.Reason, func(t *testing.T) {
			t.Parallel() // some linger until the sender has heard why
			w := newWorld(t, app)
			r := w.client()
			go func() {
				for range 5000 {
					c.send(r)
					if r.try() != nil {
						return
					}
				}
			}()
			code, reason := newReader(r).awaitGoaway()
			if code != EnhanceYourCalm || reason != c.why.Reason {
				t.Errorf("GOAWAY with %d %q", code, reason)
			}
			if got := w.clients.waitRefused(t); got != c.why.Reason {
				t.Errorf("counted as %q", got)
			}
			r.c.Close()
		})
	}
}

// newReader reads r's connection in another goroutine than writes it.
func newReader(r *raw) *raw {
	out := newRaw(r.t, r.c)
	out.in = r.in
	out.dec = hpack.NewDecoder(4096, func(f hpack.HeaderField) { out.got = append(out.got, f) })
	return out
}

// TestHonestTraffic is what the limits must let pass: PINGs for bandwidth, a window for
// each small frame, cancellations, and thousands of calls in a second.
func TestHonestTraffic(t *testing.T) {
	w := newWorld(t, answers(t), quiet)
	k := w.caller()
	if _, err := k.run(3000, 50); err != nil {
		t.Fatal(err)
	}
	r := w.client()
	for id := uint32(1); id < 1000; id += 2 {
		r.post(id)
		r.data(id, id%4 == 1, hello)
		if id%4 != 1 {
			r.out = appendReset(r.out, id, Cancel)
		}
		r.out = appendWindow(r.out, 0, 18)
		if id%20 == 1 {
			r.out = appendPing(r.out, 0, []byte("bandwide"))
		}
	}
	go r.try()
	in := newReader(r)
	for n := 0; n < 250; {
		f, err := in.next()
		if err != nil {
			t.Fatal(err)
		}
		if f.kind == frameGoaway {
			t.Fatalf("GOAWAY %d %s", f.code(), f.payload[8:])
		}
		if f.end() {
			n++
		}
	}
}

// TestSlowHeads bounds how long a preface and a header block may take.
func TestSlowHeads(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {})
	w := newWorld(t, app, func(w *world) { w.out.Config.HeadTimeout = 100 * time.Millisecond })
	c := w.dial()
	io.WriteString(c, preface[:10])
	if got := w.clients.waitRefused(t); got != ErrPrefaceSlow.Reason {
		t.Errorf("%s", got)
	}
	w = newWorld(t, app)
	r := w.client()
	r.ping()
	w.impatient()
	r.out = appendHeader(r.out, 0, frameHeaders, 0, 1)
	r.flush()
	if _, reason := r.awaitGoaway(); reason != ErrHeadSlow.Reason {
		t.Errorf("%s", reason)
	}
	// An idle connection may stay.
	w = newWorld(t, app)
	r = w.client()
	r.ping()
	for _, c := range w.impatient() {
		c.mu.Lock()
		if !c.deadline.IsZero() {
			t.Errorf("an idle connection ends at %v", c.deadline)
		}
		c.mu.Unlock()
	}
	r.ping()
}

// impatient has clients that are connected send their heads at once.
func (w *world) impatient() (list []*conn) {
	w.out.mu.Lock()
	defer w.out.mu.Unlock()
	for c := range w.out.conns {
		c.mu.Lock()
		c.cfg.HeadTimeout = 100 * time.Millisecond
		c.mu.Unlock()
		list = append(list, c)
	}
	return list
}

// TestLiveness asks a silent peer with streams, and gives it up.
func TestLiveness(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr, func(w *world) {
		w.out.Config.PingEvery, w.out.Config.PingTimeout = 50*time.Millisecond, 4*time.Second
	})
	r := w.client()
	r.post(1)
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	f := r.await("PING", func(f *frame) bool { return f.kind == framePing && f.flags&flagAck == 0 })
	r.out = appendPing(r.out, flagAck, f.payload)
	r.flush()
	r.await("another PING", func(f *frame) bool { return f.kind == framePing && f.flags&flagAck == 0 })
	if code, reason := r.awaitGoaway(); reason != ErrSilent.Reason || code != EnhanceYourCalm {
		t.Errorf("%d %s", code, reason)
	}
	if code := s.awaitReset(1); code != Cancel {
		t.Errorf("code %d", code)
	}
}

// TestStalls resets readers that do not open their windows only when much waits for them.
func TestStalls(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, strings.Repeat("x", 100<<10)) })
	w := newWorld(t, app, func(w *world) {
		w.out.Config.StallBytes, w.out.Config.StallTime = 150<<10, 100*time.Millisecond
	})
	r := w.client(setting{settingWindow, 0})
	r.get(1)
	r.flush()
	r.awaitHead(1)
	for range 4 { // one alone may wait
		r.ping()
		time.Sleep(60 * time.Millisecond)
	}
	r.get(3)
	r.get(5)
	r.flush()
	if code := r.awaitReset(1); code != EnhanceYourCalm {
		t.Errorf("code %d", code)
	}
	if x := w.clients.wait(t, 1)[0]; x.Failure != ErrWindowStall.Reason {
		t.Errorf("%+v", x)
	}
	r.ping()
}

// TestProtocolErrors sends what breaks the protocol where h2spec does not look.
func TestProtocolErrors(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			<-r.Context().Done() // an answer would end the stream first
		}
	})
	for _, c := range []struct {
		why  *Refusal
		send func(r *raw)
	}{
		{ErrGoawayLast, func(r *raw) {
			r.out = appendGoaway(r.out, 4, NoError, "")
			r.out = appendGoaway(r.out, 6, NoError, "")
		}},
		{ErrPush, func(r *raw) { r.out = append(appendHeader(r.out, 4, framePush, flagEndHeaders, 1), 0, 0, 0, 2) }},
		{ErrFlow, func(r *raw) {
			r.post(1)
			for range connWindow/maxFrame + 2 {
				r.data(1, false, make([]byte, maxFrame))
			}
		}},
	} {
		t.Run(c.why.Reason, func(t *testing.T) {
			w := newWorld(t, app)
			r := w.client()
			c.send(r)
			go r.try()
			in := newReader(r)
			if c.why == ErrFlow { // the stream's own window comes first
				if code := in.awaitReset(1); code != FlowControlError {
					t.Errorf("code %d", code)
				}
				return
			}
			if code, reason := in.awaitGoaway(); code != c.why.Code || reason != c.why.Reason {
				t.Errorf("%d %s", code, reason)
			}
		})
	}
}
