package proxy

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"assay.dev/proxy/golden"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
)

// relayBuffer is what one read of an application takes at most. Readers borrow it
// only while bytes are there, so a connection that says nothing holds none.
const relayBuffer = 32 << 10

var relayBuffers = sync.Pool{New: func() any { return new([relayBuffer]byte) }}

// pipe couples a connection of the application with one stream of a peer's.
//
//	application --read--> copyToStream --Write--> stream     the owner's goroutine
//	application <--write- Received <------------- stream     the session's reader
//
// Received never blocks: what the socket does not take at once is queued, at most a
// window of it because it is not acknowledged, and a goroutine that exists only
// meanwhile writes it.
//
// A pipe starts held: what the peer sends is kept until release, because the
// application's connection is not there yet (server) or because the peer's bytes
// decide what the connection is (client). Whatever ends a stream early is only noted
// and the owner's read woken: it alone decides whether to try elsewhere.
type pipe struct {
	p      *Proxy
	series *golden.Series

	mu       sync.Mutex
	conn     nowait.Conn // nil until release, on the server's side
	raw      syscall.RawConn
	st       mux.Stream
	held     bool
	queue    []byte // received, not written
	spare    []byte // to queue in while the other one is written
	draining bool   // a goroutine writes
	anything bool   // the peer sent a byte or its fin
	since    time.Time
	fin      bool // the peer sent its fin
	ended    bool // and it was passed on
	reset    mux.Code
	broken   error // writing to the application failed
	done     chan struct{}

	arg   []byte // of try
	n     int
	err   error
	tries func(fd uintptr) bool
}

func newPipe(p *Proxy, conn nowait.Conn) *pipe {
	k := &pipe{p: p, conn: conn, held: true, done: make(chan struct{})}
	k.tries = k.try
	return k
}

// wake ends the owner's read; k.mu is held.
func (k *pipe) wake() {
	if k.conn != nil {
		wakeReads(k.conn)
	}
}

// Received is called by the session's reader.
func (k *pipe) Received(st mux.Stream, b []byte, fin bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken != nil {
		return
	}
	if !k.anything {
		k.anything, k.since = true, time.Now()
	}
	k.st = st
	k.fin = k.fin || fin
	if k.series != nil {
		k.series.In(len(b))
	}
	if k.held {
		k.queue = append(k.queue, b...)
		k.wake()
		return
	}
	if !k.draining && len(b) > 0 {
		n := k.write(b)
		if n > 0 {
			st.Consumed(n)
		}
		b = b[n:]
	}
	if len(b) > 0 {
		k.queue = append(k.queue, b...)
	}
	k.settle()
}

// Reset is called when the stream ended early.
func (k *pipe) Reset(_ mux.Stream, code mux.Code) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.reset == 0 {
		k.reset = code
		k.over()
		k.wake()
	}
}

// over ends the wait of an owner that has nothing left to read; k.mu is held.
func (k *pipe) over() {
	select {
	case <-k.done:
	default:
		close(k.done)
	}
}

// Writable is never needed: copyToStream blocks.
func (k *pipe) Writable(mux.Stream) {}

// release lets the peer's bytes flow to conn.
func (k *pipe) release(conn nowait.Conn, raw syscall.RawConn, series *golden.Series) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.conn, k.raw, k.series = conn, raw, series
	k.held = false
	if n := len(k.queue); n > 0 && series != nil {
		series.In(n)
	}
	k.settle()
}

// settle passes on what is left to pass on; k.mu is held.
func (k *pipe) settle() {
	switch {
	case k.held || k.draining || k.reset != 0 || k.broken != nil:
	case len(k.queue) > 0:
		k.draining = true
		k.p.wg.Go(k.drain)
	case k.fin && !k.ended:
		k.ended = true
		k.conn.CloseWrite()
		k.over()
	}
}

// drain writes the queue and waits for the socket as it must.
func (k *pipe) drain() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.queue) > 0 && k.broken == nil && k.reset == 0 {
		b, st := k.queue, k.st
		k.queue, k.spare = k.spare[:0], nil
		k.mu.Unlock()
		n, err := k.conn.Write(b)
		st.Consumed(n)
		k.mu.Lock()
		k.spare = b
		if err != nil {
			k.fail(err)
		}
	}
	k.draining = false
	k.queue, k.spare = nil, nil // an idle pipe holds no buffers
	k.settle()
}

// write hands the socket what it takes now.
func (k *pipe) write(b []byte) int {
	k.arg, k.n, k.err = b, 0, nil
	err := k.raw.Write(k.tries)
	k.arg = nil
	if err == nil {
		err = k.err
	}
	if err != nil {
		k.fail(err)
	}
	return k.n
}

func (k *pipe) try(fd uintptr) bool {
	k.n, k.err = nowait.Write(fd, k.arg)
	return true
}

// fail notes that the application takes no more.
func (k *pipe) fail(err error) {
	if k.broken == nil {
		k.broken = err
		k.queue = nil
		k.over()
		k.wake()
	}
}

// state is what the owner needs to know.
type pipeState struct {
	anything bool
	since    time.Time
	server   [16]byte // the first bytes that are held, for detection
	n        int
	fin      bool
	reset    mux.Code
	broken   error
}

func (k *pipe) look() (s pipeState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s = pipeState{anything: k.anything, since: k.since, fin: k.fin, reset: k.reset, broken: k.broken}
	if k.held {
		s.n = copy(s.server[:], k.queue)
	}
	return s
}

// source reads an application's connection without holding a buffer while it waits.
type source struct {
	raw syscall.RawConn
	buf *[relayBuffer]byte
	n   int
	err error
	fn  func(fd uintptr) bool
}

func newSource(raw syscall.RawConn) *source {
	s := &source{raw: raw}
	s.fn = s.try
	return s
}

// read returns the next bytes, in a buffer that free gives back.
func (s *source) read() ([]byte, error) {
	s.n, s.err = 0, nil
	if err := s.raw.Read(s.fn); err != nil {
		s.free()
		return nil, err
	}
	if s.err != nil || s.n == 0 {
		s.free()
		if s.err == nil {
			s.err = io.EOF
		}
		return nil, s.err
	}
	return s.buf[:s.n], nil
}

func (s *source) free() {
	if s.buf != nil {
		relayBuffers.Put(s.buf)
		s.buf = nil
	}
}

func (s *source) try(fd uintptr) bool {
	if s.buf == nil {
		s.buf = relayBuffers.Get().(*[relayBuffer]byte)
	}
	s.n, s.err = nowait.Read(fd, s.buf[:])
	if s.err == nowait.Again {
		s.n, s.err = 0, nil
		s.free()
		return false
	}
	return true
}

// wakeReads makes a pending and every later read of c return a deadline error,
// until clearWake.
func wakeReads(c nowait.Conn) { c.SetReadDeadline(time.Unix(1, 0)) }

func clearWake(c nowait.Conn) { c.SetReadDeadline(time.Time{}) }

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
