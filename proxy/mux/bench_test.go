package mux

import (
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// waiter is a client's handler: it lets one goroutine know that the answer is whole.
type waiter struct {
	done chan struct{}
	n    int
}

func (w *waiter) Received(st Stream, p []byte, fin bool) {
	w.n += len(p)
	st.Consumed(len(p))
	if fin {
		w.done <- struct{}{}
	}
}
func (w *waiter) Reset(st Stream, code Code) { w.n = -1; w.done <- struct{}{} }
func (w *waiter) Writable(Stream)            {}

// answerer answers each request with the same bytes, from the session's reader.
type answerer struct{ answer []byte }

func (a *answerer) Received(st Stream, p []byte, fin bool) {
	if fin {
		st.TryWrite(a.answer, true)
	}
}
func (a *answerer) Reset(Stream, Code) {}
func (a *answerer) Writable(Stream)    {}

func answering(size int) Accept {
	a := &answerer{make([]byte, size)}
	return func(Stream, []byte) (Handler, Code) { return a, 0 }
}

// BenchmarkRequest is a small request and its answer over TLS on loopback; both
// proxies' halves are in this process. writes/op counts conn.Write of both sides.
func BenchmarkRequest(b *testing.B) {
	for _, conns := range []string{"tls", "tcp"} {
		for _, streams := range []int{1, 8, 64, 256} {
			b.Run(fmt.Sprintf("%s/streams=%d", conns, streams), func(b *testing.B) {
				c, s := transports[conns](b)
				p := start(b, c, s, Config{}, Config{}, answering(200), nil)
				open, request := make([]byte, 40), make([]byte, 150)
				var left atomic.Int64
				left.Store(int64(b.N))
				b.ReportAllocs()
				b.ResetTimer()
				cpu := cpuTime()
				var wg sync.WaitGroup
				for range streams {
					wg.Go(func() {
						w := &waiter{done: make(chan struct{}, 1)}
						for left.Add(-1) >= 0 {
							if _, _, err := p.client.Open(open, request, true, w); err != nil {
								b.Error(err)
								return
							}
							<-w.done
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64((cpuTime()-cpu).Nanoseconds())/float64(b.N), "cpu-ns/op")
				b.ReportMetric(float64(p.client.writes+p.server.writes)/float64(b.N), "writes/op")
			})
		}
	}
}

// cpuTime is what this process has used so far, user and system.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// discard consumes what arrives.
type discard struct{ waiter }

// BenchmarkBulk moves data one way over TLS on loopback.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			c, s := secure(b)
			w := &discard{waiter{done: make(chan struct{}, streams)}}
			p := start(b, c, s, Config{}, Config{}, func(Stream, []byte) (Handler, Code) { return w, 0 }, nil)
			chunk := make([]byte, 64<<10)
			b.SetBytes(int64(len(chunk)))
			b.ReportAllocs()
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range streams {
				st, _, err := p.client.Open(nil, nil, false, &waiter{done: make(chan struct{}, 1)})
				if err != nil {
					b.Fatal(err)
				}
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if err := st.Write(chunk, false); err != nil {
							b.Error(err)
							return
						}
					}
					st.Write(nil, true)
					<-w.done
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkIdleSession reports what one end of an idle session holds: crypto/tls, and beside
// it the session with its goroutine's stack.
func BenchmarkIdleSession(b *testing.B) {
	for b.Loop() {
	}
	bare := perEnd(b, 0)
	b.ReportMetric(bare, "tls-B/conn")
	b.ReportMetric(perEnd(b, 200)-bare, "after-small-B/session")
	b.ReportMetric(perEnd(b, 16<<10)-bare, "after-large-B/session")
}

// TestIdleSessionMemory holds an idle TLS connection with its session to 40 KiB at each
// end, whatever it has carried.
func TestIdleSessionMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has memory of its own")
	}
	for _, size := range []int{200, 16 << 10} {
		n := perEnd(t, size)
		t.Logf("%.0f bytes after %d", n, size)
		if n > 40<<10 {
			t.Errorf("after a request of %d bytes one end of an idle session holds %.0f bytes", size, n)
		}
	}
}

// perEnd returns how many bytes of heap and stack an end of an idle TLS connection takes:
// without a session for size 0, else after a request of size bytes.
func perEnd(t testing.TB, size int) float64 {
	const pairs = 100
	var conns []net.Conn
	var live []*Session
	var wg sync.WaitGroup
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range pairs {
		c, s := secure(t)
		conns = append(conns, c, s)
		if size == 0 {
			continue
		}
		w := &waiter{done: make(chan struct{}, 1)}
		for i, conn := range []net.Conn{c, s} {
			x := New(conn, i == 0, Config{PingEvery: time.Hour}, answering(10))
			live = append(live, x)
			wg.Go(func() { x.Run() })
		}
		live[len(live)-2].Open(nil, make([]byte, size), true, w)
		<-w.done
	}
	for _, x := range live {
		x.mu.Lock()
		x.shrink() // as the keepalive does
		x.mu.Unlock()
	}
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	for _, x := range live {
		x.Close(nil)
	}
	wg.Wait()
	for _, c := range conns {
		c.Close()
	}
	return float64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse) / (2 * pairs)
}
