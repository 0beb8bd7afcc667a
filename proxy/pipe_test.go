package proxy

import (
	"io"
	"net"
	"runtime"
	"sync"
	"testing"

	"assay.dev"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/mux"
)

// tcpPair connects two sockets.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	y, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close(); y.Close() })
	return x.(*net.TCPConn), y.(*net.TCPConn)
}

// opaque is one opaque connection through two proxies' pipes and a session without TLS,
// to an application that sends everything back.
func opaque(t testing.TB) *net.TCPConn {
	user, near := tcpPair(t)
	far, app := tcpPair(t)
	a, b := tcpPair(t)
	p, rec := &Proxy{}, golden.New(0)
	var running sync.WaitGroup
	pump := func(c *net.TCPConn, st mux.Stream) {
		raw, _ := c.SyscallConn()
		from := newSource(raw)
		for {
			data, err := from.read()
			if err != nil {
				st.Write(nil, true)
				return
			}
			st.Write(data, false)
			from.free()
		}
	}
	couple := func(k *pipe, c *net.TCPConn) {
		raw, _ := c.SyscallConn()
		k.release(c, raw, rec.Series(assay.SignalKey{Protocol: assay.Opaque}))
	}
	accept := func(st mux.Stream, _ []byte) (mux.Handler, mux.Code) {
		k := newPipe(p, far)
		couple(k, far)
		running.Go(func() { pump(far, st) })
		return k, 0
	}
	client, server := mux.New(mux.NewSocket(a), true, mux.Config{}, nil), mux.New(mux.NewSocket(b), false, mux.Config{}, accept)
	for _, s := range []*mux.Session{client, server} {
		running.Go(func() { s.Run() })
	}
	running.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := app.Read(buf)
			if err != nil {
				return
			}
			app.Write(buf[:n])
		}
	})
	k := newPipe(p, near)
	st, _, err := client.Open(nil, nil, false, k)
	if err != nil {
		t.Fatal(err)
	}
	couple(k, near)
	running.Go(func() { pump(near, st) })
	t.Cleanup(func() {
		for _, c := range []*net.TCPConn{user, near, far, app} {
			c.Close()
		}
		client.Close(nil)
		server.Close(nil)
		running.Wait()
		p.wg.Wait()
	})
	return user
}

// exchange sends message n times and reads it back.
func exchange(t testing.TB, c *net.TCPConn, message []byte, n int) {
	answer := make([]byte, len(message))
	for range n {
		if _, err := c.Write(message); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, answer); err != nil {
			t.Fatal(err)
		}
	}
}

func BenchmarkOpaque(b *testing.B) {
	c := opaque(b)
	message := make([]byte, 50)
	exchange(b, c, message, 1000)
	b.ReportAllocs()
	b.ResetTimer()
	exchange(b, c, message, b.N)
}

// TestOpaqueAllocations: nothing is allocated for what passes through pipes.
func TestOpaqueAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	c := opaque(t)
	message := make([]byte, 50)
	exchange(t, c, message, 1000)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 10000
	exchange(t, c, message, n)
	runtime.ReadMemStats(&after)
	if per := float64(after.Mallocs-before.Mallocs) / n; per > 0.1 {
		t.Errorf("%.2f allocations for a message there and back, want none", per)
	}
}
