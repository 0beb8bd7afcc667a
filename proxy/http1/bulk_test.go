package http1

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// sampled runs f and returns how far the heap grew meanwhile.
func sampled(f func()) uint64 {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	runtime.GC()
	before := heap()
	most := before
	stop := make(chan struct{})
	var sampler sync.WaitGroup
	sampler.Go(func() {
		for {
			most = max(most, heap())
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	f()
	close(stop)
	sampler.Wait()
	return most - before
}

// zeros reads n bytes.
func zeros(t testing.TB, r io.Reader, n int64) {
	t.Helper()
	if got, err := io.CopyN(io.Discard, r, n); err != nil {
		t.Errorf("%d of %d bytes: %v", got, n, err)
	}
}

func fill(c net.Conn, n int64) error {
	piece := make([]byte, 128<<10)
	for n > 0 {
		m, err := c.Write(piece[:min(n, int64(len(piece)))])
		if err != nil {
			return err
		}
		n -= int64(m)
	}
	return nil
}

// TestBulk carries a large body both ways in bounded memory.
func TestBulk(t *testing.T) {
	size := int64(256 << 20)
	if testing.Short() || !pooled {
		size = 64 << 20
	}
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		grown := sampled(func() {
			post := fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size)
			say(t, c, post)
			go fill(c, size)
			a := app.accept()
			a.SetDeadline(time.Now().Add(time.Minute))
			c.SetDeadline(time.Now().Add(time.Minute))
			expect(t, a, post)
			zeros(t, a, size)
			head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
			say(t, a, head)
			go fill(a, size)
			expect(t, c, head)
			zeros(t, c, size)
			swap(t, c, a, getA, okay)
		})
		if grown > 16<<20 {
			t.Errorf("the heap grew by %d bytes", grown)
		}
	})
}

// TestSlowEnds: whoever does not read holds up nobody else, and costs a window.
func TestSlowEnds(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		const size = 64 << 20
		down, up := w.dial(), w.dial()
		say(t, down, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
		post := fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size)
		say(t, up, post)
		b := app.accept()
		expect(t, b, post)
		for _, c := range []net.Conn{down, up, a, b} {
			c.SetDeadline(time.Now().Add(time.Minute))
		}
		var writers sync.WaitGroup
		grown := sampled(func() {
			writers.Go(func() { fill(a, size) })
			writers.Go(func() { fill(up, size) })
			// Nobody reads down or b; others get on meanwhile.
			other := w.dial()
			say(t, other, getB)
			o := app.accept()
			expect(t, o, getB)
			say(t, o, okayB)
			expect(t, other, okayB)
			for range 2000 {
				swap(t, other, o, getB, okayB)
			}
		})
		if grown > 8<<20 {
			t.Errorf("the heap grew by %d bytes", grown)
		}
		expect(t, down, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
		zeros(t, down, size)
		zeros(t, b, size)
		writers.Wait()
		say(t, b, okay)
		expect(t, up, okay)
	})
}

// TestStalledUploadNoticesReset: the client resets while the application does not
// read, so nobody reads the client either.
func TestStalledUploadNoticesReset(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
		say(t, c, post)
		a := app.accept()
		expect(t, a, post)
		c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if err := fill(c, 1000000000); !isTimeout(err) {
			t.Fatal(err)
		}
		reset(c)
		if x := w.servers.wait(t, 1)[0]; x.Failure != "client-gone" {
			t.Errorf("%+v", x)
		}
		expectGone(t, a)
	})
}

func BenchmarkBulk(b *testing.B) {
	const size = 1 << 20
	body := strings.Repeat("x", size)
	for _, mode := range []string{meshed, plain} {
		b.Run(mode, func(b *testing.B) {
			app := newScript(b)
			w := newWorld(b, mode, app.addr, quiet)
			c := w.dial()
			c.SetDeadline(time.Time{})
			say(b, c, getA)
			a := app.accept()
			a.SetDeadline(time.Time{})
			var serving sync.WaitGroup
			serving.Go(func() {
				answer := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", size, body)
				buf := make([]byte, len(getA))
				for {
					if _, err := io.ReadFull(a, buf); err != nil {
						return
					}
					if _, err := io.WriteString(a, answer); err != nil {
						return
					}
				}
			})
			head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
			buf := make([]byte, len(head)+size)
			io.ReadFull(c, buf)
			b.SetBytes(size)
			b.ReportAllocs()
			cpu := cpuTime()
			b.ResetTimer()
			for range b.N {
				say(b, c, getA)
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(b.N), "cpu-us/op")
			c.Close()
			w.in.close()
			serving.Wait()
		})
	}
}
