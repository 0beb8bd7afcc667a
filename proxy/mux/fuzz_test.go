package mux

import (
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"assay.dev/proxy/pairtest"
)

// side is one end of one stream in the model: what was asked of it and what it saw.
// Bytes carry their own position, so that a byte in the wrong place shows itself.
type side struct {
	m    *model
	st   Stream
	name string

	sent      int
	finSent   bool
	resetCode Code // what we reset it with
	short     bool // the last TryWrite took less than given
	accepted  bool // the handler exists

	got      int
	held     int
	finGot   bool
	resetGot Code
	inside   bool
	shut     bool // we said so
	shutGot  int
}

type model struct {
	mu   sync.Mutex
	bad  string
	easy bool // handlers consume at once (the end of a run)
	all  []*[2]*side
	far  map[string]*side // by open payload, until the stream is accepted
}

func (m *model) fail(format string, args ...any) {
	if m.bad == "" {
		m.bad = fmt.Sprintf(format, args...)
	}
}

func pattern(name string, at int) byte { return name[len(name)-1] ^ byte(at) ^ byte(at>>8)*31 }

func (x *side) enter(what string) {
	x.m.mu.Lock()
	if x.inside {
		x.m.fail("%s: %s while another call runs", x.name, what)
	}
	if x.resetGot != 0 {
		x.m.fail("%s: %s after Reset", x.name, what)
	}
	x.inside = true
}

func (x *side) leave() {
	x.inside = false
	x.m.mu.Unlock()
}

func (x *side) Received(st Stream, p []byte, fin bool) {
	x.enter("Received")
	defer x.leave()
	if x.finGot {
		x.m.fail("%s: Received after fin", x.name)
	}
	if len(p) == 0 && !fin {
		x.m.fail("%s: Received nothing", x.name)
	}
	for i, c := range p {
		if c != pattern(x.name, x.got+i) {
			x.m.fail("%s: byte %d is wrong", x.name, x.got+i)
			break
		}
	}
	x.got += len(p)
	x.held += len(p)
	x.finGot = fin
	if x.m.easy {
		st.Consumed(x.held)
		x.held = 0
	}
}

func (x *side) Reset(st Stream, code Code) {
	x.enter("Reset")
	x.resetGot = code
	x.leave()
}

func (x *side) Shut(st Stream) {
	x.enter("Shut")
	x.shutGot++
	x.leave()
}

func (x *side) Writable(st Stream) {
	x.enter("Writable")
	x.short = false
	x.leave()
}

// ended is whether the API may say so.
func (x *side) ended() bool { return x.resetCode != 0 || x.resetGot != 0 || x.finSent && x.finGot }

func (x *side) write(n int, fin bool) {
	if !x.accepted || x.finSent {
		return
	}
	p := make([]byte, n)
	for i := range p {
		p[i] = pattern(x.name, x.sent+i)
	}
	x.short = false // before the call: Writable may come at once
	x.m.mu.Unlock()
	k, err := x.st.TryWrite(p, fin)
	x.m.mu.Lock()
	if err != nil {
		return // checked at the end: only an ended stream says so
	}
	x.sent += k
	x.finSent = fin && k == n
}

// check compares one end with the other once nothing moves any more.
func (m *model) check(x, y *side) {
	clean := x.resetCode == 0 && y.resetCode == 0
	switch {
	case x.got > y.sent:
		m.fail("%s: got %d of %d bytes", x.name, x.got, y.sent)
	case clean && (x.resetGot != 0 || y.resetGot != 0):
		m.fail("%s: reset %v by nobody", x.name, x.resetGot)
	case clean && (x.got != y.sent || !x.finGot):
		m.fail("%s: got %d of %d bytes, fin %v", x.name, x.got, y.sent, x.finGot)
	case x.shutGot > 1 || x.shutGot == 1 && !y.shut:
		m.fail("%s: told %d times of a half-close", x.name, x.shutGot)
	case x.resetGot != 0 && x.resetGot != y.resetCode:
		m.fail("%s: reset with %v, the peer said %v", x.name, x.resetGot, y.resetCode)
	case y.resetCode != 0 && y.resetGot == 0 && x.resetGot == 0 && x.resetCode == 0 && !(x.finSent && x.finGot):
		m.fail("%s: never heard of the peer's reset", x.name)
	}
}

// FuzzSession runs a script of operations on both ends of several streams and
// compares what each end saw with what the other did.
func FuzzSession(f *testing.F) {
	f.Add([]byte{0, 0x00, 10, 0x06, 0, 0x16, 0, 0x02, 5, 0x06, 0, 0x12, 0, 0x07, 9})
	f.Add([]byte{0, 0x00, 10, 0x01, 200, 0x02, 0, 0x13, 9, 0x24, 50, 0x45, 1})
	f.Add([]byte{1, 0x00, 255, 0x10, 255, 0x11, 255, 0x01, 255, 0x03, 0, 0x04, 0, 0x12, 3})
	f.Add([]byte{2, 0x00, 1, 0x06, 0, 0x00, 2, 0x81, 255, 0x91, 255, 0x82, 0, 0x93, 0, 0x07, 7, 0x00, 4, 0xa4, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) == 0 || len(script) > 400 {
			t.Skip()
		}
		var a, b net.Conn
		if script[0]%2 == 0 {
			x, y := pairtest.TCP(t)
			a, b = NewSocket(x), NewSocket(y)
		} else {
			a, b = net.Pipe()
		}
		m := &model{far: map[string]*side{}}
		accept := func(st Stream, open []byte) (Handler, Code) {
			m.mu.Lock()
			defer m.mu.Unlock()
			x := m.far[string(open)]
			if x == nil {
				m.fail("unknown open payload %q", open)
				return nil, Refused
			}
			if open[0] == 'r' {
				x.resetCode = Denied
				return nil, Denied
			}
			x.st, x.accepted = st, true
			return x, 0
		}
		cfg := Config{Window: 16 << 10}
		s := [2]*Session{New(a, true, cfg, accept), New(b, false, cfg, accept)}
		var wg sync.WaitGroup
		var end [2]error
		for i := range s {
			wg.Go(func() { end[i] = s[i].Run() })
		}
		m.run(script[1:], s)
		m.finish(t, s)
		for i := range s {
			s[i].Drain()
		}
		wg.Wait()
		for i, err := range end {
			if err != nil {
				t.Errorf("session %d: %v", i, err)
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, p := range m.all {
			m.check(p[0], p[1])
			m.check(p[1], p[0])
		}
		if m.bad != "" {
			t.Fatal(m.bad)
		}
	})
}

func (m *model) run(script []byte, s [2]*Session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(script) >= 2 {
		op, arg := script[0], int(script[1])
		script = script[2:]
		which := int(op >> 5 & 3)
		end := int(op >> 4 & 1)
		if op&7 == 0 || len(m.all) == 0 {
			if len(m.all) < 8 {
				m.open(s[end], arg)
			}
			continue
		}
		x := m.all[which%len(m.all)][end]
		switch op & 7 {
		case 1:
			x.write(arg*100, false)
		case 2:
			x.write(arg, true)
		case 3:
			if x.accepted && !x.ended() {
				x.resetCode = AppReset
				m.mu.Unlock()
				x.st.Reset(AppReset)
				m.mu.Lock()
			}
		case 4:
			n := min(x.held, arg*100)
			x.held -= n
			m.mu.Unlock()
			x.st.Consumed(n)
			m.mu.Lock()
		case 5: // a stale stream is harmless
			m.mu.Unlock()
			Stream{x.st.c, x.st.id + 1<<20}.Reset(Broken)
			Stream{x.st.c, x.st.id + 1<<20}.TryWrite([]byte("stale"), true)
			m.mu.Lock()
		case 6:
			if x.accepted && !x.shut {
				x.shut = true
				m.mu.Unlock()
				x.st.Shut()
				m.mu.Lock()
			}
		default: // let the other goroutines run
			m.mu.Unlock()
			time.Sleep(time.Duration(arg) * time.Microsecond)
			m.mu.Lock()
		}
	}
}

func (m *model) open(s *Session, arg int) {
	n := len(m.all)
	kind := "ok"
	if arg%16 == 15 {
		kind = "r"
	}
	near := &side{m: m, name: fmt.Sprintf("near %d", n)}
	far := &side{m: m, name: fmt.Sprintf("far %d", n)}
	payload := fmt.Sprint(kind, n)
	m.far[payload] = far
	m.all = append(m.all, &[2]*side{near, far})
	data := make([]byte, arg*150)
	for i := range data {
		data[i] = pattern(far.name, i)
	}
	// Bytes are patterned for the side that receives them.
	near.name, far.name = far.name, near.name
	near.accepted = true
	fin := arg%5 == 0
	m.mu.Unlock()
	st, k, err := s.Open([]byte(payload), data, fin, near)
	m.mu.Lock()
	if err != nil {
		m.fail("open: %v", err)
	}
	near.st, near.sent = st, k
	near.finSent = fin && k == len(data)
}

// finish consumes everything, ends every direction and waits until no stream is left.
func (m *model) finish(t *testing.T, s [2]*Session) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		m.mu.Lock()
		m.easy = true
		open := 0
		for _, p := range m.all {
			for _, x := range p {
				if !x.st.IsZero() && !x.ended() {
					open++
					held := x.held
					x.held = 0
					m.mu.Unlock()
					x.st.Consumed(held)
					m.mu.Lock()
					x.write(0, true)
				}
			}
		}
		bad := m.bad
		m.mu.Unlock()
		left := 0
		for i := range s {
			s[i].mu.Lock()
			left += s[i].streams.n
			s[i].mu.Unlock()
		}
		if bad != "" || left == 0 && open == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d streams are left, %d ends are open", left, open)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// FuzzFrames feeds a session bytes: it must end with a reason, or go on, but never
// panic, hang, or call a handler that has had its last call.
func FuzzFrames(f *testing.F) {
	f.Add(greeting())
	f.Add(frames(greeting(), appendOpen(nil, flagFin, 1, []byte("x"), []byte("data")), appendPing(nil, framePing, 1)))
	f.Add(frames(greeting(), appendOpen(nil, 0, 1, nil, nil), data(1, "hello", 0), appendCredit(nil, 1, minCredit), appendShut(nil, 1), appendReset(nil, 1, AppReset), appendShut(nil, 1)))
	f.Add(frames(greeting(), appendGoaway(nil, 0, 0, "bye"), appendGoaway(nil, flagFin, 0, "now")))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, prefix := range [][]byte{nil, greeting()} {
			a, b := net.Pipe()
			var calls []*call
			s := New(a, false, Config{Window: 16 << 10, MaxStreams: 4}, func(st Stream, open []byte) (Handler, Code) {
				h := newCall()
				h.onData = func(st Stream, p []byte, fin bool) {
					st.TryWrite(p, fin)
					if len(p) > 0 && p[0] == 'R' {
						st.Reset(AppReset)
					}
				}
				calls = append(calls, h)
				return h, 0
			})
			peer := newRaw(b)
			done := make(chan struct{})
			go func() {
				peer.Write(append(prefix, in...))
				b.Close()
				close(done)
			}()
			if s.Run() == nil && !s.heardBye {
				t.Error("ended without a reason")
			}
			<-done
			<-peer.heard
			for _, h := range calls {
				if h.bad != "" {
					t.Error(h.bad)
				}
			}
			if n := s.Streams(); n != 0 {
				t.Errorf("%d streams are left", n)
			}
		}
	})
}
