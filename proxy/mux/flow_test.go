package mux

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"assay.dev/proxy/pairtest"
)

// TestBothSidesBulk: both peers write as much as they can through tiny socket
// buffers, with the credit for it going the other way on the same connection. If a
// reader ever waited for a writer this would never end.
//
// Smaller buffers would test the kernel: with a window below loopback's segment size
// (32 KiB) each segment waits for the persist timer. At 4 KiB two plain connections
// without any of our code take 13 s for 512 KiB each way, and the mux as long.
func TestBothSidesBulk(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		for _, x := range []net.Conn{c, s} {
			if tcp := tcpUnder(x); tcp != nil {
				tcp.SetReadBuffer(32 << 10)
				tcp.SetWriteBuffer(16 << 10)
			}
		}
		const streams, size = 8, 1 << 20
		var mu sync.Mutex
		var far []*call
		var wg sync.WaitGroup
		block := make([]byte, size)
		p := start(t, c, s, Config{Window: 64 << 10}, Config{Window: 64 << 10}, func(st Stream, open []byte) (Handler, Code) {
			h := newCall()
			mu.Lock()
			far = append(far, h)
			mu.Unlock()
			wg.Go(func() { st.Write(block, true) })
			return h, 0
		}, nil)
		var near []*call
		for range streams {
			h := newCall()
			near = append(near, h)
			st, _, err := p.client.Open(nil, nil, false, h)
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() { st.Write(block, true) })
		}
		for _, h := range near {
			h.until(t, "bytes from the server", func() bool { return h.fin && len(h.got) == size })
		}
		wg.Wait()
		mu.Lock()
		defer mu.Unlock()
		for _, h := range far {
			h.until(t, "bytes from the client", func() bool { return h.fin && len(h.got) == size })
		}
	})
}

func tcpUnder(c net.Conn) *net.TCPConn {
	if k := socketUnder(c); k != nil {
		return k.Conn.(*net.TCPConn)
	}
	if p, ok := c.(plain); ok {
		return p.Conn.(*net.TCPConn)
	}
	return nil
}

// TestSlowConsumer: a stream that nobody drains takes its window and no more, and
// the others go on. With its first consumption the writer goes on too.
func TestSlowConsumer(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		const window = 64 << 10
		slow := newCall()
		slow.hold = true
		var slowStream Stream
		p := start(t, c, s, Config{Window: window}, Config{Window: window}, func(st Stream, open []byte) (Handler, Code) {
			if string(open) == "slow" {
				slowStream = st
				return slow, 0
			}
			return echo(st, open)
		}, nil)
		st, _, err := p.client.Open([]byte("slow"), nil, false, newCall())
		if err != nil {
			t.Fatal(err)
		}
		written := make(chan error, 1)
		go func() { written <- st.Write(make([]byte, 3*window), true) }()
		slow.until(t, "a full window", func() bool { return len(slow.got) == window })
		for i := range 50 {
			h := newCall()
			if _, _, err := p.client.Open(nil, fmt.Append(nil, i), true, h); err != nil {
				t.Fatal(err)
			}
			h.until(t, "another stream", func() bool { return h.fin })
		}
		select {
		case err := <-written:
			t.Fatal("the writer went on without credit:", err)
		default:
		}
		for done := 0; done < 3*window; {
			slow.until(t, "more", func() bool { return len(slow.got) > done })
			slow.mu.Lock()
			n := len(slow.got) - done
			slow.mu.Unlock()
			slowStream.Consumed(n)
			done += n
		}
		slow.until(t, "fin", func() bool { return slow.fin })
		if err := <-written; err != nil {
			t.Fatal(err)
		}
	})
}

// TestCreditExhaustion: TryWrite takes the window exactly, then nothing, and
// Writable follows the peer's consumption.
func TestCreditExhaustion(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		const window = 32 << 10
		far := newCall()
		far.hold = true
		var farStream Stream
		p := start(t, c, s, Config{Window: window}, Config{Window: window, MaxWindow: window}, func(st Stream, open []byte) (Handler, Code) {
			farStream = st
			return far, 0
		}, nil)
		waitFor(t, "the settings", func() bool { p.client.mu.Lock(); defer p.client.mu.Unlock(); return p.client.settled })
		h := newCall()
		st, n, err := p.client.Open(nil, make([]byte, 2*window), true, h)
		if err != nil || n != window {
			t.Fatalf("Open took %d, %v", n, err)
		}
		far.until(t, "the window", func() bool { return len(far.got) == window && !far.fin })
		if n, err := st.TryWrite([]byte("x"), false); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		h.mu.Lock()
		early := h.writable
		h.mu.Unlock()
		if early != 0 {
			t.Fatal("Writable without credit")
		}
		farStream.Consumed(10 * window) // more than there was: counted as what there was
		h.until(t, "Writable", func() bool { return h.writable > 0 })
		if n, err := st.TryWrite(make([]byte, 2*window), true); n != window || err != nil {
			t.Fatal(n, err)
		}
		// Fin alone needs no credit.
		if n, err := st.TryWrite(nil, true); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		far.until(t, "fin", func() bool { return far.fin && len(far.got) == 2*window })
	})
}

// TestWindowGrows: a stream whose bytes are consumed as they come gets a wider window,
// up to the bounds for one stream and for all of them, and gives it back at its end.
func TestWindowGrows(t *testing.T) {
	overAll(t, func(t *testing.T, c, s net.Conn) {
		const window = 32 << 10
		cfg := Config{Window: window, MaxWindow: 4 * window, MaxGrowth: 5 * window}
		p := start(t, c, s, Config{}, cfg, func(Stream, []byte) (Handler, Code) { return newCall(), 0 }, nil)
		widths := func() (all []int, grown int) {
			p.server.mu.Lock()
			defer p.server.mu.Unlock()
			p.server.streams.each(func(c *stream) { all = append(all, c.window/window) })
			slices.Sort(all)
			return all, p.server.grown
		}
		var streams []Stream
		for range 3 {
			st, _, err := p.client.Open(nil, nil, false, newCall())
			if err != nil {
				t.Fatal(err)
			}
			if err := st.Write(make([]byte, 20*window), false); err != nil {
				t.Fatal(err)
			}
			streams = append(streams, st)
		}
		waitFor(t, "windows of 1, 3 and 4 times the first", func() bool {
			all, grown := widths()
			return slices.Equal(all, []int{1, 3, 4}) && grown == 5*window
		})
		streams[0].Reset(Cancelled)
		waitFor(t, "what the first stream had", func() bool { all, grown := widths(); return len(all) == 2 && grown == 2*window })
	})
}

// TestLongFrames: a frame that is longer than what a receiver holds arrives whole in
// as many pieces as it likes, its fin with the last of them, and a reset between two
// pieces drops what follows.
func TestLongFrames(t *testing.T) {
	for _, piece := range []int{1, 7, 4 << 10, maxPayload} {
		a, b := net.Pipe()
		far := newCall()
		s := New(b, false, Config{}, func(Stream, []byte) (Handler, Code) { return far, 0 })
		ended := make(chan error, 1)
		go func() { ended <- s.Run() }()
		go io.Copy(io.Discard, a)
		body := make([]byte, maxPayload)
		for i := range body {
			body[i] = byte(i * 31 >> 3)
		}
		say := frames(greeting(), appendOpen(nil, 0, 1, nil, nil), data(1, string(body), flagFin))
		for len(say) > 0 {
			n := min(piece, len(say))
			if _, err := a.Write(say[:n]); err != nil {
				t.Fatal(err)
			}
			say = say[n:]
		}
		far.until(t, "the frame", func() bool { return far.fin })
		if !bytes.Equal(far.got, body) {
			t.Errorf("in pieces of %d: other bytes", piece)
		}
		a.Close()
		<-ended
	}
}

// TestResetWithinFrame: what follows of a long frame after its stream was reset is
// nobody's, and the session goes on.
func TestResetWithinFrame(t *testing.T) {
	a, b := net.Pipe()
	far, next := newCall(), newCall()
	streams := make(chan Stream, 2)
	s := New(b, false, Config{}, func(st Stream, _ []byte) (Handler, Code) {
		streams <- st
		if st.ID() == 1 {
			return far, 0
		}
		return next, 0
	})
	ended := make(chan error, 1)
	go func() { ended <- s.Run() }()
	go io.Copy(io.Discard, a)
	long := data(1, string(make([]byte, maxPayload)), flagFin)
	a.Write(frames(greeting(), appendOpen(nil, 0, 1, nil, nil), long[:20<<10]))
	st := <-streams
	far.until(t, "a part", func() bool { return len(far.got) > 10<<10 })
	st.Reset(Cancelled)
	far.mu.Lock()
	was := len(far.got)
	far.mu.Unlock()
	a.Write(long[20<<10:])
	a.Write(frames(appendOpen(nil, flagFin, 3, nil, []byte("next"))))
	next.until(t, "the next stream", func() bool { return next.fin && string(next.got) == "next" })
	if n := len(far.got); n > was+10<<10 || n > 20<<10 {
		t.Errorf("%d bytes of a stream that was reset at %d", n, was)
	}
	a.Close()
	<-ended
}

// TestBulkLeavesRoom: with bulk queued by many streams and nothing moving, a small
// frame finds no more than a bounded number of bytes before it.
func TestBulkLeavesRoom(t *testing.T) {
	a, b := net.Pipe() // nobody reads b yet
	p := New(a, true, Config{}, nil)
	var wg sync.WaitGroup
	for range 20 {
		st, _, err := p.Open(nil, nil, false, newCall())
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { st.Write(make([]byte, 1<<20), false) })
	}
	blocked := func() (n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.streams.each(func(c *stream) {
			if c.flags&flagBlocked != 0 {
				n++
			}
		})
		return n
	}
	waitFor(t, "all writers to wait", func() bool { return blocked() == 20 })
	p.mu.Lock()
	if n := len(p.out); n > bulkQueued+headerSize+maxPayload {
		t.Errorf("%d bytes are queued", n)
	}
	p.mu.Unlock()
	for range 100 {
		if _, n, err := p.Open([]byte("small"), make([]byte, 1000), true, newCall()); n != 1000 || err != nil {
			t.Fatal(n, err)
		}
	}
	p.Close(nil)
	p.Run()
	b.Close()
	wg.Wait()
}

// TestAllocations: nothing is allocated for a stream or a frame once the session is
// warm. crypto/tls allocates a little for each record that it reads, so this runs on
// a bare socket.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	a, b := pairtest.TCP(t)
	p := start(t, NewSocket(a), NewSocket(b), Config{}, Config{}, answering(200), nil)
	w := &waiter{done: make(chan struct{}, 1)}
	open, request, bulk := make([]byte, 40), make([]byte, 150), make([]byte, 100<<10)
	one := func() {
		if _, _, err := p.client.Open(open, request, true, w); err != nil {
			t.Fatal(err)
		}
		<-w.done
	}
	large := func() {
		st, _, err := p.client.Open(open, nil, false, w)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Write(bulk, true); err != nil {
			t.Fatal(err)
		}
		<-w.done
	}
	for range 100 {
		one()
		large()
	}
	if n := testing.AllocsPerRun(2000, one); n != 0 {
		t.Errorf("%v allocations for a request", n)
	}
	if n := testing.AllocsPerRun(500, large); n > 1 { // the flusher starts now and then
		t.Errorf("%v allocations for 100 KiB", n)
	}
}
