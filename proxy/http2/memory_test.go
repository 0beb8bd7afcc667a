package http2

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev/proxy/mux"
)

// peaks follows what is held at most.
type peaks struct {
	m    []*Memory
	most []atomic.Int64
	stop chan struct{}
	done sync.WaitGroup
}

func watch(t testing.TB, m ...*Memory) *peaks {
	p := &peaks{m: m, most: make([]atomic.Int64, len(m)), stop: make(chan struct{})}
	p.done.Go(func() {
		for {
			for i, m := range p.m {
				p.most[i].Store(max(p.most[i].Load(), int64(m.Held())))
			}
			select {
			case <-p.stop:
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	})
	t.Cleanup(func() { close(p.stop); p.done.Wait() })
	return p
}

// hoard sends as much as it may on n streams of a connection, and a byte more whenever it
// can, until the connection ends. It counts its streams' ends.
func hoard(w *world, n int, deaf bool, resets *atomic.Int64) {
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Error(err)
		return
	}
	defer c.Close()
	w.hoarders.add(c)
	r := newRaw(w.t, c)
	r.out = append(r.out, preface...)
	r.out = appendSettings(r.out)
	windows, open, all := map[uint32]int{}, initialWindow, initialWindow
	for i := range n {
		id := uint32(2*i + 1)
		r.post(id)
		windows[id] = initialWindow
	}
	chunk := make([]byte, 8<<10)
	for {
		for id, win := range windows {
			for k := min(win, all, len(chunk)); k > 0; k = min(win, all, len(chunk)) {
				r.data(id, false, chunk[:k])
				win, all = win-k, all-k
			}
			windows[id] = win
		}
		if r.try() != nil {
			return
		}
		f, err := r.next()
		switch {
		case err != nil:
			return
		case f.kind == frameSettings && f.flags&flagAck == 0:
			if deaf { // it goes on as if it had not heard
				break
			}
			for p := f.payload; len(p) >= 6; p = p[6:] {
				if p[1] == settingWindow {
					size := int(p[2])<<24 | int(p[3])<<16 | int(p[4])<<8 | int(p[5])
					for id := range windows {
						windows[id] += size - open
					}
					open = size
				}
			}
			r.out = appendHeader(r.out, 0, frameSettings, flagAck, 0)
		case f.kind == frameReset, f.kind == frameHeaders:
			if _, ok := windows[f.stream]; ok {
				delete(windows, f.stream)
				resets.Add(1)
			}
		case f.kind == frameWindow:
			more := int(f.payload[0])<<24 | int(f.payload[1])<<16 | int(f.payload[2])<<8 | int(f.payload[3])
			if f.stream == 0 {
				all += more
			} else if _, ok := windows[f.stream]; ok {
				windows[f.stream] += more
			}
		}
	}
}

// crowd is connections that a test ends.
type crowd struct {
	mu   sync.Mutex
	list []net.Conn
}

func (h *crowd) add(c net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, c)
}

func (h *crowd) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.list {
		c.Close()
	}
}

// TestHoards: clients that upload to an application which takes nothing hold no more than
// what the proxies may, whether they do as they are told or not; somebody else is served
// meanwhile; and when they are gone nothing is held.
func TestHoards(t *testing.T) {
	for name, deaf := range map[string]bool{"heeding": false, "deaf": true} {
		t.Run(name, func(t *testing.T) {
			const limit, conns, streams = 16 << 20, 40, 40 // the application takes 2,000 streams
			near, far := NewMemory(limit), NewMemory(limit)
			stuck := make(chan struct{})
			app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method == "GET" {
					io.WriteString(w, "served")
					return
				}
				select {
				case <-r.Context().Done():
				case <-stuck:
				}
			})
			w := newWorld(t, app, func(w *world) {
				w.out.Config.Memory, w.inbound.Memory = near, far
				w.inbound.StallTime = 200 * time.Millisecond // then streams of a peer make room for its others
				w.clients.silent, w.servers.silent = true, true
			})
			peak := watch(t, near, far)
			var resets atomic.Int64
			var hoarders sync.WaitGroup
			for range conns {
				hoarders.Go(func() { hoard(w, streams, deaf, &resets) })
			}
			// What they could send is 40 x 40 x 64 KiB: 100 MiB, and four times that beyond.
			until(t, "the memory is used", func() bool { return near.Held() > limit/4 || far.Held() > limit/4 })
			for range 20 {
				until(t, "somebody else is served", func() bool {
					r, err := w.ask()
					return err == nil && r == "200"
				})
			}
			for i, m := range []*Memory{near, far} {
				// Beyond it is one read of each at most.
				if most := peak.most[i].Load(); most > limit+conns*int64(classes[len(classes)-1]) {
					t.Errorf("%d bytes were held of %d", most, limit)
				}
				t.Logf("%d bytes were held at most, %d are", peak.most[i].Load(), m.Held())
			}
			t.Logf("%d streams were ended", resets.Load())
			w.hoarders.end()
			hoarders.Wait()
			close(stuck)
			until(t, "nothing is held", func() bool { return near.Held() == 0 })
			// But for the buffers of the connections to the application, until they are idle.
			until(t, "nothing is held beyond", func() bool { return far.Held() < 8*(headQueued+keepBuffer) })
		})
	}
}

// ask makes a request on a connection of its own.
func (w *world) ask() (string, error) {
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	r := newRaw(w.t, c)
	r.out = appendSettings(append(r.out, preface...))
	r.get(1)
	if err := r.try(); err != nil {
		return "", err
	}
	for {
		f, err := r.next()
		if err != nil {
			return "", err
		}
		if f.kind == frameHeaders {
			return f.field(":status"), nil
		}
		if f.kind == frameReset {
			return "reset", nil
		}
	}
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// TestWindowsShrink: before anything is refused, windows shrink; uploads go on with them as
// their streams are read, and windows are as wide as ever once there is room again.
func TestWindowsShrink(t *testing.T) {
	big := strings.Repeat("x", 400<<10)
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" {
			io.WriteString(w, big)
			return
		}
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})
	w := newWorld(t, app, func(w *world) { w.out.Config.ConnMemory, w.out.Config.Memory = 6<<20, NewMemory(64<<20) })
	r := w.client(setting{settingWindow, 0})
	r.out = appendWindow(r.out, 0, 64<<20)
	// Responses wait for a reader: about 256 KiB of each.
	const readers = 16
	for id := uint32(1); id < 2*readers; id += 2 {
		r.get(id)
	}
	r.flush()
	window, owed := initialWindow, map[uint32]int{}
	// settings reads until the window is as wanted, and acknowledges what it was told.
	settings := func(what string, want func(n int) bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !want(window); time.Sleep(20 * time.Millisecond) { // or it is a flood
			if time.Now().After(deadline) {
				t.Fatalf("the window is not %s but %d", what, window)
			}
			r.out = appendPing(r.out, 0, []byte("are-you?"))
			r.flush()
			r.await("PING", func(f *frame) bool {
				switch {
				case f.kind == frameSettings && f.flags&flagAck == 0:
					for p := f.payload; len(p) >= 6; p = p[6:] {
						if binary.BigEndian.Uint16(p) == settingWindow {
							window = int(binary.BigEndian.Uint32(p[2:]))
						}
					}
					r.out = appendHeader(r.out, 0, frameSettings, flagAck, 0)
				case f.kind == frameData:
					owed[f.stream] += f.length
				case f.kind == frameReset:
					t.Fatalf("stream %d was reset with %d", f.stream, f.code())
				}
				return f.kind == framePing && f.flags&flagAck != 0
			})
			r.flush()
		}
	}
	settings("smaller", func(n int) bool { return n < initialWindow })
	// A stream that begins now has the smaller window, and gets as far as any.
	id, sent, room := uint32(2*readers+1), 0, window
	r.post(id)
	for sent < 300<<10 {
		n := min(room, 8<<10, 300<<10-sent)
		if n == 0 {
			r.flush()
			f := r.await("WINDOW_UPDATE", func(f *frame) bool { return f.kind == frameWindow && f.stream == id })
			room += int(binary.BigEndian.Uint32(f.payload))
			continue
		}
		r.data(id, false, []byte(big[:n]))
		sent, room = sent+n, room-n
	}
	r.data(id, true, nil)
	r.out = appendWindow(r.out, id, 100)
	r.flush()
	if f := r.await("the answer", func(f *frame) bool { return f.kind == frameData && f.stream == id }); string(f.payload) != fmt.Sprint(300<<10) {
		t.Errorf("%q", f.payload)
	}
	// Everybody reads.
	for id := uint32(1); id < 2*readers; id += 2 {
		r.out = appendWindow(r.out, id, 1<<20)
	}
	settings("as ever", func(n int) bool { return n == initialWindow })
	for id := uint32(1); id < 2*readers; id += 2 {
		for owed[id] < len(big) {
			f := r.await("the rest", func(f *frame) bool { return f.kind == frameData && f.stream < 2*readers })
			owed[f.stream] += f.length
		}
	}
}

// TestPoolsWhatIsOver: a stream that ends well while its connection holds too much is pooled
// as it should be: the next request gets it.
func TestPoolsWhatIsOver(t *testing.T) {
	c := newConn(t.Context(), true, Config{ConnMemory: 1 << 10})
	defer c.cancel()
	x := c.newStream()
	x.id, x.opened, x.gotEnd, x.finSent, x.observer = 1, true, true, true, nil
	x.Start = now()
	x.app.begin(&facts{}, false)
	c.streams.put(x)
	c.holds(64 << 10) // queued for a peer that does not read
	var b buffer
	b.appendFields(blockHead, []Field{{Name: ":status", Value: "200"}})
	x.Received(mux.Stream{}, b.b, true)
	if c.free != x {
		t.Fatal("the stream is not pooled: the test shows nothing")
	}
	if y := c.newStream(); y.rst || y.over || y.dead || y.Failure != "" {
		t.Errorf("a new stream has ended already: %q", y.Failure)
	}
}

// TestWindowOfLateStream: a stream has the window that holds when it begins, not that of when
// its place was taken: it may have waited for long.
func TestWindowOfLateStream(t *testing.T) {
	c := newConn(t.Context(), false, Config{})
	defer c.cancel()
	c.window = leastWindow
	x := c.newStream()
	x.opened = true
	c.asked, c.acks = initialWindow, 1
	c.mu.Lock()
	c.onAck()
	c.mu.Unlock()
	var b buffer
	b.appendFields(blockHead, []Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: "a.test"}})
	x.Received(mux.Stream{}, b.b, true)
	if x.id == 0 || x.recvWin != initialWindow {
		t.Errorf("stream %d may be sent %d bytes, and the application thinks %d", x.id, x.recvWin, initialWindow)
	}
}

// TestScarceStalls: when new streams are refused, those that nobody reads make room, the
// largest first and no more of them than it takes.
func TestScarceStalls(t *testing.T) {
	c := newConn(t.Context(), false, Config{ConnMemory: 1 << 20})
	defer c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	const at = time.Hour
	add := func(size int, stalled time.Duration) *stream {
		x := c.newStream()
		c.lastID += 2
		x.id, x.opened = c.lastID, true
		x.down.append(make([]byte, size))
		if stalled > 0 {
			x.since = at - stalled
		}
		c.streams.put(x)
		return x
	}
	large, small := add(600<<10, scarceTime+time.Second), add(16<<10, scarceTime+time.Second)
	read, recent := add(64<<10, 0), add(256<<10, scarceTime/2)
	if !c.greedy() {
		t.Fatalf("%d bytes are not too many: the test shows nothing", c.held)
	}
	c.stalls(at)
	if !large.rst || large.Failure != ErrWindowStall.Reason {
		t.Errorf("the largest of those that nobody reads goes on: %q", large.Failure)
	}
	if small.rst || read.rst || recent.rst || c.greedy() {
		t.Errorf("reset: one more %v, one that is read %v, one that was a moment ago %v; too much is held: %v", small.rst, read.rst, recent.rst, c.greedy())
	}
}

// TestAsksNext: who holds most may have nothing to give, as all of it is queued for a peer
// that does not read. Then others are asked.
func TestAsksNext(t *testing.T) {
	m := NewMemory(1 << 20)
	holder := func() *conn {
		c := newConn(t.Context(), true, Config{Memory: m})
		t.Cleanup(c.cancel)
		return c
	}
	queue, streams := holder(), holder()
	queue.mu.Lock()
	queue.holds(900 << 10)
	queue.mu.Unlock()
	streams.mu.Lock()
	x := streams.newStream()
	x.id, x.opened = 1, true
	streams.streams.put(x)
	x.up.append(make([]byte, 256<<10))
	streams.mu.Unlock()
	m.ask()
	until(t, "the memory is given back", func() bool { return m.Held() <= 1<<20 })
	streams.mu.Lock()
	defer streams.mu.Unlock()
	if !x.rst && !x.sentEnd {
		t.Error("the stream goes on")
	}
}
