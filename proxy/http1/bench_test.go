package http1

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// answers starts an application that answers every request that ends in an empty
// line with the same 50 bytes, without a parser: the benchmark is of the pair.
func answers(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				buf := make([]byte, 4096)
				n := 0
				for {
					m, err := c.Read(buf[n:])
					if err != nil {
						return
					}
					if n += m; bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
						n = 0
						if _, err := c.Write(response); err != nil {
							return
						}
					}
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); running.Wait() })
	return l.Addr().String()
}

var response = []byte("HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nContent-Type: text/plain\r\nContent-Length: 50\r\nConnection: keep-alive\r\n\r\n" +
	"01234567890123456789012345678901234567890123456789")

var pooled = true

var get = []byte("GET / HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")

// load sends n requests over each of conns keep-alive connections.
func load(t testing.TB, w *world, conns, n int) {
	var clients sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(n))
	for range conns {
		c := w.dial()
		c.SetDeadline(time.Time{})
		clients.Go(func() {
			defer c.Close()
			buf := make([]byte, 4096)
			for left.Add(-1) >= 0 {
				if _, err := c.Write(get); err != nil {
					t.Error(err)
					return
				}
				for got := 0; got < len(response); {
					m, err := c.Read(buf)
					if err != nil {
						t.Error(err)
						return
					}
					got += m
				}
			}
		})
	}
	clients.Wait()
}

func quiet(w *world) { w.clients.silent, w.servers.silent = true, true }

func BenchmarkPair(b *testing.B) {
	for _, mode := range []string{meshed, plain} {
		for _, c := range []struct {
			name  string
			conns int
		}{{"c=1", 1}, {"c=8", 8}, {"c=64", 64}} {
			b.Run(mode+"/"+c.name, func(b *testing.B) {
				w := newWorld(b, mode, answers(b), quiet)
				load(b, w, c.conns, 1000)
				b.ReportAllocs()
				cpu := cpuTime()
				b.ResetTimer()
				load(b, w, c.conns, b.N)
				b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(b.N), "cpu-us/op")
			})
		}
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestSteadyStateAllocations holds both sides to no allocation for a request.
func TestSteadyStateAllocations(t *testing.T) {
	if !pooled {
		t.Skip("pools do not hold what they are given")
	}
	for _, mode := range []string{unencrypted, plain} { // crypto/tls allocates for each read
		w := newWorld(t, mode, answers(t), quiet)
		load(t, w, 4, 2000)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const n = 20000
		load(t, w, 4, n)
		runtime.ReadMemStats(&after)
		if perRequest := float64(after.Mallocs-before.Mallocs) / n; perRequest > 0.1 {
			t.Errorf("%s: %.2f allocations for a request of the whole process, want none", mode, perRequest)
		}
	}
}

// TestIdleConnection holds an idle keep-alive connection to 8 KiB on the client's
// side.
func TestIdleConnection(t *testing.T) {
	if !pooled {
		t.Skip("the race detector has memory of its own")
	}
	w := newWorld(t, meshed, answers(t), quiet)
	load(t, w, 1, 100)
	const n = 500
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = w.dial() // the test's own end is not part of the bill
	}
	buf := make([]byte, 4096)
	stack, heap := memory()
	for _, c := range conns {
		c.Write(get)
		if _, err := io.ReadFull(c, buf[:len(response)]); err != nil {
			t.Fatal(err)
		}
	}
	stackNow, heapNow := memory()
	t.Logf("after a request: %d bytes of stack and %d of heap more for each connection", (stackNow-stack)/n, (heapNow-heap)/n)
	for _, c := range conns {
		c.Close()
	}
	for range conns {
		<-w.served
	}
	stackEnd, heapEnd := memory()
	perConn := (stackNow + heapNow - stackEnd - heapEnd) / n
	t.Logf("%d bytes for each idle connection: stack %d, heap %d", perConn, (stackNow-stackEnd)/n, (heapNow-heapEnd)/n)
	if perConn > 8<<10 {
		t.Errorf("%d bytes for an idle connection, want at most %d", perConn, 8<<10)
	}
}

func memory() (stack, heap int64) {
	for range 4 {
		runtime.GC() // each one may halve a stack
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.StackInuse), int64(m.HeapAlloc)
}
