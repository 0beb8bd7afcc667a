package proxy

import (
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/pairtest"
)

// opaque is n opaque connections through two proxies' pipes and one session without TLS,
// to an application that sends everything back.
func opaque(t testing.TB, n int) (users []*net.TCPConn) {
	p, rec := &Proxy{}, golden.New(0)
	var running sync.WaitGroup
	couple := func(k *pipe, c *net.TCPConn) syscall.RawConn {
		raw, _ := c.SyscallConn()
		k.release(c, raw, rec.Series(assay.SignalKey{Protocol: assay.Opaque}))
		return raw
	}
	pump := func(from *source, st mux.Stream) {
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
	echo := func(app *net.TCPConn) {
		buf := make([]byte, 64<<10)
		for {
			n, err := app.Read(buf)
			if err != nil {
				return
			}
			app.Write(buf[:n])
		}
	}
	var all []*net.TCPConn
	var fars []*net.TCPConn // the server's side, in the order in which streams come
	for range n {
		far, app := pairtest.TCP(t)
		fars, all = append(fars, far), append(all, far, app)
		running.Go(func() { echo(app) })
	}
	accept := func(st mux.Stream, _ []byte) (mux.Handler, mux.Code) {
		far := fars[0]
		fars = fars[1:]
		k := newPipe(p, far)
		from := newSource(couple(k, far))
		running.Go(func() { pump(from, st) })
		return k, 0
	}
	a, b := pairtest.TCP(t)
	client, server := mux.New(mux.NewSocket(a), true, mux.Config{}, nil), mux.New(mux.NewSocket(b), false, mux.Config{}, accept)
	for _, s := range []*mux.Session{client, server} {
		running.Go(func() { s.Run() })
	}
	for range n {
		user, near := pairtest.TCP(t)
		users, all = append(users, user), append(all, user, near)
		k := newPipe(p, near)
		st, _, err := client.Open(nil, nil, false, k)
		if err != nil {
			t.Fatal(err)
		}
		from := newSource(couple(k, near))
		running.Go(func() { pump(from, st) })
	}
	t.Cleanup(func() {
		for _, c := range all {
			c.Close()
		}
		client.Close(nil)
		server.Close(nil)
		running.Wait()
		p.wg.Wait()
	})
	return users
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
	c := opaque(b, 1)[0]
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
	c := opaque(t, 1)[0]
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

// TestOpaqueBulkBothWays has several connections of a session carry much in both
// directions at once: whoever waits for room or credit must be told of it.
func TestOpaqueBulkBothWays(t *testing.T) {
	message := make([]byte, 1<<20)
	rounds := 60
	if raceEnabled {
		rounds = 15
	}
	var running sync.WaitGroup
	for i, c := range opaque(t, 4) {
		running.Go(func() {
			answer := make([]byte, len(message))
			for round := range rounds {
				c.SetDeadline(time.Now().Add(time.Minute))
				sent := make(chan error, 1)
				go func() {
					_, err := c.Write(message)
					sent <- err
				}()
				n, err := io.ReadFull(c, answer)
				if err == nil {
					err = <-sent
				}
				if err != nil {
					t.Errorf("connection %d, round %d: %d bytes came back, %v", i, round, n, err)
					return
				}
			}
		})
	}
	running.Wait()
}
