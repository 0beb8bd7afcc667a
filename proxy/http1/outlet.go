package http1

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"assay.dev/proxy/nowait"
)

// outlet is the way into an application's socket. Whoever has bytes writes them
// himself, without waiting; what the kernel does not take is queued, and one
// goroutine waits for the kernel as long as something is. The queue is bounded by
// the stream's window: its bytes are acknowledged when they have left.
type outlet struct {
	// flushed tells the owner how many queued bytes left. It is called without the
	// lock.
	flushed func(n int)

	mu        sync.Mutex
	tcp       nowait.Conn
	raw       syscall.RawConn
	try, drip func(fd uintptr) bool // bound once: a closure would escape
	p         []byte                // argument and results of try
	n         int
	tryErr    error

	first, last *buffer
	draining    bool
	stall       time.Duration // how long the kernel may take nothing of the queue; 0: for ever
	until       time.Time     // the deadline for that
	held        bool          // what is written may wait in the kernel for what follows
	fin         bool          // shut down once the queue is empty
	err         error         // the socket takes nothing any more
	wg          sync.WaitGroup
}

func (o *outlet) init(flushed func(n int), stall time.Duration) {
	o.flushed, o.stall = flushed, stall
	o.try, o.drip = o.tryFD, o.dripFD
}

// open connects the outlet. What was queued before leaves now.
func (o *outlet) open(tcp nowait.Conn, raw syscall.RawConn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tcp, o.raw = tcp, raw
	if o.first != nil {
		o.startDrain()
	} else if o.fin {
		tcp.CloseWrite()
	}
}

// flush writes what was queued before open without a goroutine, if the kernel takes
// it.
func (o *outlet) flush(tcp nowait.Conn, raw syscall.RawConn) {
	n := 0
	raw.Write(func(fd uintptr) bool {
		n, _ = o.writeQueued(fd)
		return true
	})
	o.open(tcp, raw)
	o.flushed(n)
}

// write gives p to the kernel, or queues it. It returns how many bytes the kernel
// took; flushed reports the others. After an error nothing more is taken, and what
// was queued is forgotten.
func (o *outlet) write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return 0, o.err
	}
	n := 0
	if !o.busy() && o.raw != nil {
		o.p, o.n, o.tryErr = p, 0, nil
		err := o.raw.Write(o.try)
		n, o.p = o.n, nil
		if err == nil {
			err = o.tryErr
		}
		if err != nil {
			o.err = err
			return n, err
		}
	}
	if n < len(p) {
		o.enqueue(p[n:])
		if o.raw != nil {
			o.startDrain()
		}
	}
	return n, nil
}

// hold has what is written wait in the kernel for the shutdown that is likely to follow:
// both then leave as one segment. Whoever calls it calls push afterwards.
func (o *outlet) hold() {
	o.mu.Lock()
	o.held = true
	o.mu.Unlock()
}

// push has bytes leave that hold kept, if no shutdown followed.
func (o *outlet) push() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.held = false
	if !o.fin && o.raw != nil {
		o.raw.Control(func(fd uintptr) { nowait.Push(fd) })
	}
}

func (o *outlet) tryFD(fd uintptr) bool {
	if o.held {
		o.n, o.tryErr = nowait.WriteMore(fd, o.p)
	} else {
		o.n, o.tryErr = nowait.Write(fd, o.p)
	}
	return true
}

func (o *outlet) enqueue(p []byte) {
	for len(p) > 0 {
		if o.last == nil || o.last.full() {
			b := bufferFor(min(len(p), classes[medium]))
			if o.last == nil {
				o.first = b
			} else {
				o.last.next = b
			}
			o.last = b
		}
		n := copy(o.last.room(), p)
		o.last.b = o.last.b[:len(o.last.b)+n]
		p = p[n:]
	}
}

func (o *outlet) startDrain() {
	if !o.draining {
		o.draining = true
		o.wg.Add(1)
		go o.drain()
	}
}

// drain waits for the kernel until the queue is empty. It has the descriptor's write
// lock while it does, so nobody else may write meanwhile, holding locks that flushed
// takes.
func (o *outlet) drain() {
	defer o.wg.Done()
	o.mu.Lock()
	o.extend()
	o.mu.Unlock()
	for {
		err := o.raw.Write(o.drip)
		o.mu.Lock()
		if err != nil {
			o.fail(err)
		}
		if o.first == nil {
			o.draining = false
			if !o.until.IsZero() {
				o.until = time.Time{}
				o.tcp.SetWriteDeadline(o.until)
			}
			if o.fin && o.err == nil {
				o.tcp.CloseWrite()
			}
			o.mu.Unlock()
			o.flushed(0)
			return
		}
		o.mu.Unlock()
	}
}

// extend gives whoever reads the other end of the socket more time: it made progress.
func (o *outlet) extend() {
	if o.stall <= 0 {
		return
	}
	if now := time.Now(); o.until.Sub(now) < o.stall-o.stall/16 {
		o.until = now.Add(o.stall)
		o.tcp.SetWriteDeadline(o.until)
	}
}

// unbound lets the other end take its time: the socket is a tunnel's now.
func (o *outlet) unbound() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stall = 0
	if !o.until.IsZero() {
		o.until = time.Time{}
		o.tcp.SetWriteDeadline(o.until)
	}
}

// dripFD writes what is queued and asks to be called again until nothing is.
func (o *outlet) dripFD(fd uintptr) bool {
	n, more := o.writeQueued(fd)
	o.flushed(n)
	return !more
}

func (o *outlet) writeQueued(fd uintptr) (total int, more bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.first != nil {
		b := o.first
		n, err := nowait.Write(fd, b.b[b.from:])
		if err != nil {
			o.fail(err)
			break
		}
		total += n
		if n > 0 && o.draining {
			o.extend()
		}
		if b.from += n; b.from < len(b.b) {
			return total, true
		}
		if o.first = b.next; o.first == nil {
			o.last = nil
		}
		b.release()
	}
	return total, false
}

func (o *outlet) fail(err error) {
	if o.err == nil {
		o.err = err
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.tcp.SetLinger(0) // the kernel need not try, either
		}
	}
	for b := o.first; b != nil; {
		next := b.next
		b.release()
		b = next
	}
	o.first, o.last = nil, nil
}

// shutdown passes a half-close on, after what is queued.
func (o *outlet) shutdown() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fin {
		return
	}
	o.fin = true
	if !o.busy() && o.tcp != nil && o.err == nil {
		o.tcp.CloseWrite()
	}
}

// busy says that the queue comes first.
func (o *outlet) busy() bool { return o.first != nil || o.draining }

// empty reports whether everything has left, or never will.
func (o *outlet) empty() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.first == nil
}

func (o *outlet) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// close forgets the queue. The owner has closed the socket, and waits for the
// goroutine that may drain it.
func (o *outlet) close() {
	o.mu.Lock()
	o.fail(net.ErrClosed)
	o.mu.Unlock()
	o.wg.Wait()
}
