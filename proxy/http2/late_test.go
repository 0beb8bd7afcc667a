package http2

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"assay.dev/proxy/mux"
)

// late is a Dispatcher in which calls about the first attempt come while the next one is
// dispatched: their goroutine had been waiting for the connection's lock.
type late struct {
	*world
	mu    sync.Mutex
	first mux.Stream
}

func (l *late) Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if x.Attempt > 0 {
		var reader sync.WaitGroup
		defer reader.Wait()
		first := l.first
		reader.Go(func() {
			var b buffer
			b.appendFields(blockHead, []Field{{Name: ":status", Value: "599"}})
			h.Received(first, b.b, true)
			h.Reset(first, mux.Refused)
			h.Writable(first)
		})
	}
	st, n, err := l.world.Dispatch(ctx, x, data, fin, h, batch, wait)
	if err == nil && x.Attempt == 0 {
		l.first = st
	}
	return st, n, err
}

// TestLateCalls: what the mesh still says of an attempt that was given up is not taken for
// the next one's.
func TestLateCalls(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	w := newWorld(t, app, func(w *world) { w.dispatcher = &late{world: w} })
	r := w.client()
	for id := uint32(1); id < 20; id += 2 {
		w.mu.Lock()
		w.refuse = []mux.Code{mux.Refused}
		w.mu.Unlock()
		r.post(id)
		r.data(id, true, []byte("again"))
		r.flush()
		if f := r.awaitHead(id); f.field(":status") != "200" {
			t.Fatalf("%v", f.fields)
		}
		if f := r.await("the body", func(f *frame) bool { return f.kind == frameData }); string(f.payload) != "again" {
			t.Errorf("%q", f.payload)
		}
	}
}

// TestAcknowledgedFirst: a peer hears that its settings hold before it is sent what they
// allow. h2spec, for one, does not look for that earlier.
func TestAcknowledgedFirst(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
	w := newWorld(t, app)
	r := w.client(setting{settingWindow, 0})
	r.get(1)
	r.flush()
	r.awaitHead(1)
	for _, n := range []uint32{1, 5} {
		r.ping() // the response waits for its window
		r.out = appendSettings(r.out, setting{settingWindow, n})
		r.flush()
		f := r.await("either", func(f *frame) bool { return f.kind == frameData || f.kind == frameSettings })
		if f.kind != frameSettings || f.flags&flagAck == 0 {
			t.Fatalf("%+v came first", f)
		}
		r.await("the data", func(f *frame) bool { return f.kind == frameData })
	}
}

// TestEndsAmidBytes ends clients' connections while the mesh brings what they do not take:
// whoever writes then must have been waited for.
func TestEndsAmidBytes(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		chunk := []byte(strings.Repeat("x", 32<<10))
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	w := newWorld(t, app)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range 10 {
				r := w.client(setting{settingWindow, maxWindow})
				r.out = appendWindow(r.out, 0, maxWindow-initialWindow)
				for id := uint32(1); id < 8; id += 2 {
					r.get(id)
				}
				r.flush()
				for total := 0; total < 1<<20; {
					f, err := r.next()
					if err != nil {
						t.Error(err)
						break
					}
					total += f.length
				}
				r.c.Close()
			}
		})
	}
	clients.Wait()
	w.clients.wait(t, 160)
}
