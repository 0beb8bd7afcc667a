package mux

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"net"
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
