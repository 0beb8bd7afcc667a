package mux

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
)

// echo answers each stream with what it sent.
func echo(st Stream, open []byte) (Handler, Code) {
	h := newCall()
	h.onData = func(st Stream, p []byte, fin bool) { st.TryWrite(p, fin) }
	return h, 0
}

func TestRequestResponse(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		p := start(t, c, s, Config{}, Config{}, func(st Stream, open []byte) (Handler, Code) {
			h := newCall()
			name := string(open)
			h.onData = func(st Stream, p []byte, fin bool) {
				if fin {
					st.TryWrite([]byte("hello "+name), true)
				}
			}
			return h, 0
		}, nil)
		for range 100 {
			h := newCall()
			st, n, err := p.client.Open([]byte("you"), []byte("who?"), true, h)
			if err != nil || n != 4 {
				t.Fatal(n, err)
			}
			h.until(t, "the answer", func() bool { return h.fin })
			if string(h.got) != "hello you" {
				t.Fatalf("got %q", h.got)
			}
			if _, err := st.TryWrite([]byte("x"), false); !errors.Is(err, ErrEnded) {
				t.Fatalf("TryWrite after fin: %v", err)
			}
		}
		waitFor(t, "no stream", func() bool { return p.client.Streams() == 0 && p.server.Streams() == 0 })
	})
}

// shutCall hears of half-closes.
type shutCall struct {
	*call
	shut chan bool // whether the fin had come
}

func (s shutCall) Shut(Stream) { s.shut <- s.fin }

// TestShut: a half-close reaches the peer before and after the fin, and harms nothing
// when it comes too late or to a handler that does not care.
func TestShut(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		accepted := make(chan shutCall, 1)
		streams := make(chan Stream, 1)
		p := start(t, c, s, Config{}, Config{}, func(st Stream, open []byte) (Handler, Code) {
			if string(open) == "deaf" {
				return echo(st, open)
			}
			h := shutCall{newCall(), make(chan bool, 2)}
			accepted <- h
			streams <- st
			return h, 0
		}, nil)
		for _, fin := range []bool{true, false} {
			h := newCall()
			st, _, err := p.client.Open([]byte("x"), []byte("request"), fin, h)
			if err != nil {
				t.Fatal(err)
			}
			far, farStream := <-accepted, <-streams
			far.until(t, "the request", func() bool { return string(far.got) == "request" && far.fin == fin })
			st.Shut()
			if got := <-far.shut; got != fin {
				t.Errorf("told of the half-close with fin %v, want %v", got, fin)
			}
			if !fin {
				st.TryWrite([]byte("more"), true)
				far.until(t, "the rest", func() bool { return far.fin })
			}
			farStream.TryWrite([]byte("answer"), true)
			h.until(t, "the answer", func() bool { return h.fin && string(h.got) == "answer" })
			st.Shut() // of a stream that is gone
		}
		h := newCall()
		st, _, err := p.client.Open([]byte("deaf"), []byte("hello"), false, h)
		if err != nil {
			t.Fatal(err)
		}
		st.Shut()
		st.TryWrite(nil, true)
		h.until(t, "the echo", func() bool { return h.fin && string(h.got) == "hello" })
	})
}

func TestBulkBothWays(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		const size = 4 << 20
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i * 7 >> 3)
		}
		accepted := make(chan *call, 1)
		p := start(t, c, s, Config{}, Config{}, func(st Stream, open []byte) (Handler, Code) {
			h := newCall()
			accepted <- h
			go st.Write(want, true)
			return h, 0
		}, nil)
		h := newCall()
		st, _, err := p.client.Open(nil, nil, false, h)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Write(want, true); err != nil {
			t.Fatal(err)
		}
		far := <-accepted
		for _, h := range []*call{h, far} {
			h.until(t, "all bytes", func() bool { return h.fin })
			if sha256.Sum256(h.got) != sha256.Sum256(want) {
				t.Fatalf("%d bytes differ, equal prefix %v", len(h.got), bytes.HasPrefix(want, h.got))
			}
		}
	})
}

func TestDrain(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		p := start(t, c, s, Config{}, Config{}, echo, nil)
		h := newCall()
		st, _, err := p.client.Open(nil, []byte("a"), false, h)
		if err != nil {
			t.Fatal(err)
		}
		h.until(t, "the echo", func() bool { return len(h.got) == 1 })
		p.server.Drain()
		waitFor(t, "the client to know", func() bool { return !p.client.Usable() })
		if _, _, err := p.client.Open(nil, nil, false, h); err != ErrDraining {
			t.Fatalf("Open while draining: %v", err)
		}
		if err := st.Write([]byte("b"), true); err != nil {
			t.Fatal(err)
		}
		h.until(t, "the rest", func() bool { return h.fin })
		for i := range p.ended {
			if err := <-p.ended[i]; err != nil {
				t.Errorf("side %d: %v", i, err)
			}
		}
	})
}

func TestResetCodes(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		far := make(chan *call, 10)
		streams := make(chan Stream, 10)
		p := start(t, c, s, Config{}, Config{}, func(st Stream, open []byte) (Handler, Code) {
			switch string(open) {
			case "denied":
				return nil, Denied
			case "nothing":
				return nil, 0
			}
			h := newCall()
			streams <- st
			far <- h
			return h, 0
		}, nil)
		bystander := newCall()
		by, _, err := p.client.Open(nil, []byte("a"), false, bystander)
		if err != nil {
			t.Fatal(err)
		}
		byFar, bySt := <-far, <-streams

		for open, want := range map[string]Code{"denied": Denied, "nothing": Refused} {
			h := newCall()
			if _, _, err := p.client.Open([]byte(open), []byte("data"), open == "denied", h); err != nil {
				t.Fatal(err)
			}
			h.until(t, "the refusal", func() bool { return h.reset != 0 })
			if h.reset != want {
				t.Errorf("%s: reset with %v", open, h.reset)
			}
		}
		// Reset by the opener, by the acceptor, and after one's own fin.
		for _, fin := range []bool{false, true} {
			h := newCall()
			st, _, err := p.client.Open(nil, nil, fin, h)
			if err != nil {
				t.Fatal(err)
			}
			other := <-far
			<-streams
			st.Reset(AppReset)
			st.Reset(Cancelled) // no more than a no-op
			other.until(t, "the reset", func() bool { return other.reset != 0 })
			if other.reset != AppReset || h.reset != 0 {
				t.Errorf("fin %v: acceptor got %v, opener %v", fin, other.reset, h.reset)
			}
			if err := st.Write([]byte("x"), false); !errors.Is(err, ErrEnded) {
				t.Error(err)
			}

			if _, _, err = p.client.Open(nil, nil, fin, h); err != nil {
				t.Fatal(err)
			}
			<-far
			(<-streams).Reset(Unreachable)
			h.until(t, "the reset", func() bool { return h.reset != 0 })
			if h.reset != Unreachable {
				t.Errorf("fin %v: opener got %v", fin, h.reset)
			}
		}
		// The bystander has seen nothing of it.
		if err := by.Write([]byte("b"), true); err != nil {
			t.Fatal(err)
		}
		byFar.until(t, "fin", func() bool { return byFar.fin })
		if string(byFar.got) != "ab" || byFar.reset != 0 {
			t.Errorf("bystander got %q, reset %v", byFar.got, byFar.reset)
		}
		if err := bySt.Write(nil, true); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "no stream and no zombie", func() bool {
			n := 0
			for _, s := range []*Session{p.client, p.server} {
				s.mu.Lock()
				n += s.streams.n + s.zombies + s.mine + s.theirs
				s.mu.Unlock()
			}
			return n == 0
		})
	})
}

func TestStreamLimit(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		p := start(t, c, s, Config{}, Config{MaxStreams: 3}, func(Stream, []byte) (Handler, Code) { return newCall(), 0 }, nil)
		var h [8]*call
		var st [8]Stream
		var err error
		for i := range h { // some before the settings are known: those in excess are refused
			h[i] = newCall()
			if st[i], _, err = p.client.Open(nil, nil, false, h[i]); err != nil && err != ErrBusy {
				t.Fatal(err)
			}
			if err == ErrBusy {
				h[i].reset = Overloaded
			}
		}
		for _, h := range h[3:] {
			h.until(t, "the refusal", func() bool { return h.reset != 0 })
			if h.reset != Overloaded || !h.reset.Unread() {
				t.Error(h.reset)
			}
		}
		waitFor(t, "three streams", func() bool { return p.client.Streams() == 3 })
		if _, _, err := p.client.Open(nil, nil, false, newCall()); err != ErrBusy {
			t.Errorf("over the limit: %v", err)
		}
		st[0].Reset(Cancelled)
		if _, _, err := p.client.Open(nil, nil, false, newCall()); err != nil {
			t.Errorf("after one ended: %v", err)
		}
		if _, _, err := p.client.Open(make([]byte, 9<<10), nil, false, newCall()); err == nil {
			t.Error("an open payload over the limit was taken")
		}
	})
}

func TestClose(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		far := make(chan *call, 1)
		p := start(t, c, s, Config{}, Config{}, func(Stream, []byte) (Handler, Code) {
			h := newCall()
			far <- h
			return h, 0
		}, nil)
		h := newCall()
		st, _, err := p.client.Open(nil, nil, false, h)
		if err != nil {
			t.Fatal(err)
		}
		other := <-far
		p.client.Close(errors.New("certificate renewed"))
		mine, theirs := <-p.ended[0], <-p.ended[1]
		if e, ok := errors.AsType[*Error](mine); !ok || e.Reason != ReasonClosed {
			t.Error(mine)
		}
		if e, ok := errors.AsType[*Error](theirs); !ok || e.Reason != ReasonPeerClosed || e.Detail != "certificate renewed" {
			t.Error(theirs)
		}
		if h.reset != Broken || other.reset != Broken {
			t.Errorf("streams reset with %v and %v", h.reset, other.reset)
		}
		if _, err := st.TryWrite([]byte("x"), true); err != ErrClosed {
			t.Error(err)
		}
		if _, _, err := p.client.Open(nil, nil, false, h); err != ErrClosed {
			t.Error(err)
		}
		if p.client.Usable() || p.client.Streams() != 0 || p.client.Err() == nil {
			t.Error("the session looks alive")
		}
		st.Consumed(1)
		st.Reset(Cancelled)
		p.client.Drain()
		p.client.Close(nil)
	})
}

// TestWriteEnds: a blocked Write returns when its stream or session ends, also while
// the connection takes nothing and the peer is not even reading.
func TestWriteEnds(t *testing.T) {
	for name, end := range map[string]func(p *pair, near, far Stream){
		"local reset":  func(p *pair, near, far Stream) { near.Reset(Cancelled) },
		"peer's reset": func(p *pair, near, far Stream) { far.Reset(AppReset) },
		"close":        func(p *pair, near, far Stream) { p.client.Close(nil) },
		"peer's close": func(p *pair, near, far Stream) { p.server.Close(nil) },
		"connection":   func(p *pair, near, far Stream) { p.server.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			overAll(t, func(t *testing.T, c, s net.Conn) {
				far := make(chan Stream, 1)
				p := start(t, c, s, Config{}, Config{}, func(st Stream, open []byte) (Handler, Code) {
					h := newCall()
					h.hold = true
					far <- st
					return h, 0
				}, nil)
				st, _, err := p.client.Open(nil, nil, false, newCall())
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { done <- st.Write(make([]byte, 1<<20), true) }()
				waitFor(t, "the writer to wait", func() bool {
					p.client.mu.Lock()
					defer p.client.mu.Unlock()
					return st.c.flags&flagBlocked != 0 && st.c.credit == 0
				})
				end(p, st, <-far)
				if err := <-done; err != ErrEnded && err != ErrClosed {
					t.Error(err)
				}
			})
		})
	}
	t.Run("nobody reads", func(t *testing.T) {
		overAll(t, func(t *testing.T, c, s net.Conn) {
			defer s.Close()
			x := New(c, true, Config{}, nil)
			ended := make(chan error, 1)
			go func() { ended <- x.Run() }()
			done := make(chan error, 300)
			for range cap(done) {
				st, _, err := x.Open(nil, nil, false, newCall())
				if err != nil {
					t.Fatal(err)
				}
				go func() { done <- st.Write(make([]byte, 64<<10), true) }()
			}
			waitFor(t, "a full queue", func() bool {
				x.mu.Lock()
				defer x.mu.Unlock()
				return x.writing && (len(done) == cap(done) || x.room.head != nil || x.full())
			})
			x.Close(nil)
			for range cap(done) {
				<-done
			}
			<-ended
		})
	})
}

// TestChurn: streams come and go quickly and end from several goroutines at once, so
// that pooled ones are used again while others are still being looked at.
func TestChurn(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		const workers, each = 32, 300
		var answers sync.WaitGroup
		answers.Add(workers * each)
		accept := func(st Stream, open []byte) (Handler, Code) {
			h := newCall()
			name := bytes.Clone(open)
			go func() { // its fin races with the opener's
				defer answers.Done()
				if err := st.Write(name, true); err != nil {
					t.Error(err)
				}
				st.Reset(AppReset) // hits nothing, or this stream alone
			}()
			return h, 0
		}
		p := start(t, c, s, Config{}, Config{}, accept, accept)
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				session := []*Session{p.client, p.server}[w%2]
				for i := range each {
					name := fmt.Sprint(w, "/", i)
					h := newCall()
					st, _, err := session.Open([]byte(name), nil, false, h)
					if err != nil {
						t.Error(err)
						return
					}
					st.TryWrite([]byte("question"), true)
					h.until(t, "the answer", func() bool { return h.fin || h.reset != 0 })
					if string(h.got) != name && h.reset == 0 {
						t.Errorf("%s got the answer %q", name, h.got)
					}
				}
			})
		}
		wg.Wait()
		answers.Wait()
		waitFor(t, "no stream", func() bool {
			p.client.mu.Lock()
			defer p.client.mu.Unlock()
			p.server.mu.Lock()
			defer p.server.mu.Unlock()
			for _, s := range []*Session{p.client, p.server} {
				if s.streams.n+s.zombies+s.mine+s.theirs != 0 {
					return false
				}
			}
			return true
		})
		for _, s := range []*Session{p.client, p.server} {
			s.mu.Lock()
			n := 0
			for c := s.free; c != nil; c = c.next {
				if n++; c.pins != 0 || c.id != 0 || c.h != nil || n > s.nfree {
					t.Error("a stream in the pool is still in use")
					break
				}
			}
			s.mu.Unlock()
		}
	})
}
