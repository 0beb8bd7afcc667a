package mux

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"assay.dev/proxy/nowait"
)

// Socket is a TCP connection whose writes stop blocking once a Session uses it.
//
// It lies under TLS. crypto/tls keeps a failed write for ever, so "would block"
// cannot be passed up through it: instead Write takes everything, hands the kernel
// what it takes now and keeps the rest. The session sees Full, writes nothing more,
// and its flusher calls drain, which waits for the kernel. So what is kept is one
// batch of the writer's at most, plus the few bytes that TLS says by itself (alerts
// and key updates, which its reader must be able to send at any time).
type Socket struct {
	net.Conn
	raw   syscall.RawConn
	tries func(fd uintptr) bool // bound once: RawConn would make a closure escape
	drips func(fd uintptr) bool

	reads func(fd uintptr) bool
	in    []byte // argument and results of reads
	inN   int
	inErr error

	nonblocking atomic.Bool
	full        atomic.Bool
	moved       atomic.Uint64 // bytes given to the kernel while draining

	mu   sync.Mutex
	left []byte // taken from the writer, not by the kernel yet
	off  int
	p    []byte // argument and results of tries
	n    int
	err  error
}

// maxLeft bounds what a Socket keeps; only a peer that makes TLS answer without end
// and never reads can reach it.
const maxLeft = 4 << 20

var errLeft = errors.New("mux: peer does not read")

// NewSocket prepares a TCP connection for tls.Client or tls.Server and New. Until
// New its writes block as usual.
func NewSocket(c *net.TCPConn) *Socket {
	k := &Socket{Conn: c}
	k.raw, _ = c.SyscallConn() // fails for a nil connection alone
	k.tries, k.drips, k.reads = k.try, k.drip, k.readFD
	return k
}

// socketUnder returns the Socket that carries conn, if there is one.
func socketUnder(conn net.Conn) *Socket {
	if k, ok := conn.(*Socket); ok {
		return k
	}
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		k, _ := t.NetConn().(*Socket)
		return k
	}
	return nil
}

// TCP returns the connection below.
func (k *Socket) TCP() *net.TCPConn { return k.Conn.(*net.TCPConn) }

// Read waits for bytes. One goroutine reads at a time.
func (k *Socket) Read(p []byte) (int, error) {
	k.in, k.inN, k.inErr = p, 0, nil
	err := k.raw.Read(k.reads)
	k.in = nil
	if err == nil {
		err = k.inErr
	}
	return k.inN, err
}

func (k *Socket) readFD(fd uintptr) bool {
	k.inN, k.inErr = nowait.Read(fd, k.in)
	switch {
	case k.inErr == nowait.Again:
		return false
	case k.inN == 0 && k.inErr == nil && len(k.in) > 0:
		k.inErr = io.EOF
	}
	return true
}

// Write takes all of p, or fails.
func (k *Socket) Write(p []byte) (int, error) {
	if !k.nonblocking.Load() {
		return k.Conn.Write(p)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	if !k.full.Load() {
		k.p, k.n, k.err = p, 0, nil
		err := k.raw.Write(k.tries)
		n, k.p = k.n, nil
		if err == nil {
			err = k.err
		}
		if err != nil {
			return n, err
		}
	}
	if n < len(p) {
		if len(k.left)-k.off+len(p)-n > maxLeft {
			return n, errLeft
		}
		k.left = append(k.left, p[n:]...)
		k.full.Store(true)
	}
	return len(p), nil
}

// try writes p once and never asks to be called again.
func (k *Socket) try(fd uintptr) bool {
	k.n, k.err = writeFD(fd, k.p)
	return true
}

// drain waits until the kernel has taken what is left.
func (k *Socket) drain() error {
	if !k.full.Load() {
		return nil
	}
	err := k.raw.Write(k.drips)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil && k.full.Load() {
		err = k.err
	}
	return err
}

// drip writes what is left and asks to be called again until nothing is.
func (k *Socket) drip(fd uintptr) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, err := writeFD(fd, k.left[k.off:])
	k.off += n
	k.moved.Add(uint64(n))
	k.err = err
	if err == nil && k.off < len(k.left) {
		return false
	}
	if err == nil {
		k.left, k.off = nil, 0
		k.full.Store(false)
	}
	return true
}

// writeFD writes what the kernel takes now; "would block" is no error.
func writeFD(fd uintptr, p []byte) (n int, err error) {
	for n < len(p) {
		m, err := nowait.Write(fd, p[n:])
		if m == 0 || err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}
