package http1

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"assay.dev/proxy/nowait"
)

// backend is one connection to the application. A goroutine dials, then one reads:
// what it reads it frames and writes into the stream of the exchange that has the
// connection now.
type backend struct {
	in     *Inbound
	key    poolKey
	origin Origin
	read   func(fd uintptr) bool // bound once
	x      atomic.Pointer[served]
	w      outlet
	cancel context.CancelFunc
	ctx    context.Context
	over   chan struct{} // closed by close

	// The goroutine's own.
	raw     syscall.RawConn
	buf     *buffer
	class   uint8
	readErr error

	// Guarded by Inbound.mu.
	listed     bool
	tick       uint32
	prev, next *backend

	mu     sync.Mutex
	tcp    *net.TCPConn
	closed bool
}

func newBackend(in *Inbound, key poolKey, x *served) *backend {
	b := &backend{in: in, key: key, origin: x.origin, over: make(chan struct{})}
	b.ctx, b.cancel = context.WithCancel(in.ctx)
	b.read = b.readFD
	b.w.init(b.flushed, in.cfg.Timeouts.Stall)
	b.x.Store(x)
	return b
}

// run is the beginning of the connection. To dial needs a large stack; serve, which may
// have to wait for long, gets a new one.
func (b *backend) run() {
	if err := b.dial(); err != nil {
		defer b.in.wg.Done()
		if x := b.x.Load(); x != nil {
			x.unreachable(b)
		}
		b.end()
		return
	}
	go b.serve()
}

// serve is the life of the connection.
func (b *backend) serve() {
	defer b.in.wg.Done()
	defer b.end()
	for {
		err := b.fill()
		x := b.x.Load()
		if x == nil {
			if x = b.in.claim(b); x == nil {
				return // it ended while idle, or spoke without being asked
			}
		}
		if err != nil {
			x.lost(b, err)
			return
		}
		more := x.respond(b, b.buf.b)
		b.class = small
		if more && b.buf.full() {
			b.class = large
		}
		b.buf.release()
		b.buf = nil
		if !more {
			return
		}
	}
}

func (b *backend) dial() error {
	tcp, err := b.in.backend.Dial(b.ctx, b.origin)
	if err != nil {
		return err
	}
	raw, err := tcp.SyscallConn()
	b.mu.Lock()
	if b.closed || err != nil {
		b.mu.Unlock()
		tcp.Close()
		return net.ErrClosed
	}
	b.tcp, b.raw = tcp, raw
	b.mu.Unlock()
	b.w.flush(tcp, raw)
	return nil
}

// fill waits for bytes; there is no buffer before they come.
func (b *backend) fill() error {
	if err := b.raw.Read(b.read); err != nil {
		return err
	}
	return b.readErr
}

func (b *backend) readFD(fd uintptr) bool {
	b.buf = takeBuffer(b.class)
	n, err := nowait.Read(fd, b.buf.room())
	if n == 0 && err == nil {
		err = io.EOF
	}
	b.buf.b = b.buf.b[:n]
	if n == 0 {
		b.buf.release()
		b.buf = nil
	}
	b.readErr = err
	return err != nowait.Again
}

// flushed follows request bytes that were queued and have left.
func (b *backend) flushed(n int) {
	x := b.x.Load()
	switch {
	case x == nil:
	case n == 0 && errors.Is(b.w.failed(), os.ErrDeadlineExceeded):
		x.stuck(b)
	default:
		x.flushed(b, n)
	}
}

// shut has run close the connection and return; anybody may call it. To close it
// here would wait for calls that wait for locks of those who call it.
func (b *backend) shut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.closed = true
	b.cancel()
	close(b.over)
	if b.tcp != nil {
		b.tcp.SetReadDeadline(longAgo)
	}
}

// abort has the connection end with a reset.
func (b *backend) abort() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tcp != nil && !b.closed {
		b.tcp.SetLinger(0)
	}
}

// close shuts the connection on behalf of an Inbound that stops.
func (b *backend) close() {
	if x := b.x.Load(); x != nil {
		x.stop(b)
	}
	b.shut()
}

// end is the last thing that run does.
func (b *backend) end() {
	b.shut()
	if b.tcp != nil {
		b.tcp.Close()
	}
	b.w.close()
	b.in.forget(b)
}
