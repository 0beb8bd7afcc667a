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

	// The reader's own.
	reads  func(fd uintptr) bool
	only   bool   // Read gives what is at hand and asks nobody
	plain  bool   // there is no TLS above
	bulk   bool   // the last reads were large: the kernel is asked for much at once
	few    int    // reads in a row that were not
	in     []byte // argument and results of reads
	inN    int
	inErr  error
	ahead  *[]byte // what was read for TLS and not yet by it is (*ahead)[from:to]
	from   int
	to     int
	record boundary

	nonblocking atomic.Bool
	full        atomic.Bool
	moved       atomic.Uint64 // bytes given to the kernel while draining

	mu     sync.Mutex
	corked bool
	batch  *[]byte // whose memory left is, when it is pooled
	left   []byte  // taken from the writer, not by the kernel yet
	off    int
	p      []byte // argument and results of tries
	n      int
	err    error
}

// maxLeft bounds what a Socket keeps; only a peer that makes TLS answer without end
// and never reads can reach it.
const maxLeft = 4 << 20

// batchSize is what is gathered for one write at most, and batches the memory for it.
const batchSize = 80 << 10

var batches = sync.Pool{New: func() any { b := make([]byte, 0, batchSize); return &b }}

// nothing is a temporary error: TLS can go on after it.
type nothing struct{}

func (nothing) Error() string   { return "mux: nothing more is at hand" }
func (nothing) Timeout() bool   { return true }
func (nothing) Temporary() bool { return true }

var errNothing net.Error = nothing{}

var errLeft = errors.New("mux: peer does not read")

// NewSocket prepares a TCP connection for tls.Client or tls.Server and New. Until
// New its writes block as usual.
func NewSocket(c nowait.Conn) *Socket {
	k := &Socket{Conn: c}
	k.raw, _ = c.SyscallConn() // fails for a nil connection alone
	k.tries, k.drips, k.reads = k.try, k.drip, k.readFD
	return k
}

// socketUnder returns the Socket that carries conn, if there is one.
func socketUnder(conn net.Conn) *Socket {
	if k, ok := conn.(*Socket); ok {
		k.plain = true
		return k
	}
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		k, _ := t.NetConn().(*Socket)
		return k
	}
	return nil
}

// Read waits for bytes. One goroutine reads at a time.
//
// TLS asks for a header, then for a record, and takes more if it gets more. While little
// comes it gets what the kernel has, up to a page. While much comes the kernel is asked
// for several records at once, and TLS gets them one by one: its own buffer, which it
// keeps for the life of the connection, stays that of one record.
func (k *Socket) Read(p []byte) (int, error) {
	if k.from == k.to {
		if k.only {
			return 0, errNothing
		}
		k.in, k.inN, k.inErr = p, 0, nil
		err := k.raw.Read(k.reads)
		k.in = nil
		if err == nil {
			err = k.inErr
		}
		if err != nil || k.from == k.to {
			return k.inN, err
		}
	}
	return k.serve(p), nil
}

// wait is Read for somebody who needs no bytes yet, while bulk.
func (k *Socket) wait() error {
	if k.from < k.to {
		return nil
	}
	k.inErr = nil
	if err := k.raw.Read(k.reads); err != nil {
		return err
	}
	return k.inErr
}

// serve gives TLS bytes up to the end of a header or record.
func (k *Socket) serve(p []byte) int {
	n := min(len(p), k.to-k.from)
	if !k.plain {
		n = min(n, k.record.want())
	}
	copy(p, (*k.ahead)[k.from:k.from+n])
	k.record.pass(p[:n])
	if k.from += n; k.from == k.to {
		k.drop()
	}
	return n
}

func (k *Socket) drop() {
	readsAhead.Put(k.ahead)
	k.ahead, k.from, k.to = nil, 0, 0
}

func (k *Socket) readFD(fd uintptr) bool {
	var n int
	if k.bulk {
		k.ahead = readsAhead.Get().(*[]byte)
		n, k.inErr = nowait.Read(fd, *k.ahead)
		if k.to = n; n == 0 {
			k.drop()
		}
		switch {
		case n >= directRead:
			k.few = 0
		case n > 0:
			k.few++
			k.bulk = k.few < 8
		}
	} else {
		p := k.in[:min(len(k.in), directRead)]
		n, k.inErr = nowait.Read(fd, p)
		k.inN = n
		k.record.pass(p[:n])
		k.bulk, k.few = n == directRead, 0
	}
	if k.inErr == nowait.Again {
		return false
	}
	if n == 0 && k.inErr == nil {
		k.inErr = io.EOF
	}
	return true
}

const (
	directRead = 4 << 10  // what is read without a buffer of our own
	aheadRead  = 96 << 10 // and with one
)

var readsAhead = sync.Pool{New: func() any { b := make([]byte, aheadRead); return &b }}

// boundary follows TLS records through the bytes that TLS is given (RFC 8446 section
// 5.1).
type boundary struct {
	head [5]byte
	n    int // of head
	left int // of the record
}

// want is how many bytes the header or the record lacks.
func (b *boundary) want() int {
	if b.left > 0 {
		return b.left
	}
	return len(b.head) - b.n
}

func (b *boundary) pass(p []byte) {
	for len(p) > 0 {
		if b.left > 0 {
			n := min(b.left, len(p))
			b.left, p = b.left-n, p[n:]
			continue
		}
		n := copy(b.head[b.n:], p)
		b.n, p = b.n+n, p[n:]
		if b.n == len(b.head) {
			b.n, b.left = 0, int(b.head[3])<<8|int(b.head[4])
		}
	}
}

// Write takes all of p, or fails. Its frame is on the stacks of all who write, so what
// is seldom is apart.
func (k *Socket) Write(p []byte) (int, error) {
	if !k.nonblocking.Load() {
		return k.Conn.Write(p)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.corked || k.full.Load() {
		return k.gather(p)
	}
	k.p, k.n, k.err = p, 0, nil
	err := k.raw.Write(k.tries)
	k.p = nil
	if err == nil {
		err = k.err
	}
	if err != nil || k.n == len(p) {
		return k.n, err
	}
	k.full.Store(true)
	n, err := k.gather(p[k.n:])
	return k.n + n, err
}

// gather keeps p until uncork or drain.
//
//go:noinline
func (k *Socket) gather(p []byte) (int, error) {
	if !k.full.Load() && len(k.left)+len(p) > batchSize {
		if err := k.push(); err != nil {
			return 0, err
		}
	}
	if len(k.left)-k.off+len(p) > maxLeft {
		return 0, errLeft
	}
	if k.left == nil {
		k.batch = batches.Get().(*[]byte)
		k.left = *k.batch
	}
	k.left = append(k.left, p...)
	return len(p), nil
}

// cork has Write gather what it is given, for uncork to hand all of it to the kernel
// at once: TLS writes each record by itself.
func (k *Socket) cork() {
	k.mu.Lock()
	k.corked = true
	k.mu.Unlock()
}

func (k *Socket) uncork() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.corked = false
	if k.full.Load() {
		return nil
	}
	return k.push()
}

// push gives the kernel what was gathered. What it does not take is left.
func (k *Socket) push() error {
	if len(k.left) == 0 {
		return nil
	}
	n, err := k.give(k.left)
	if err != nil {
		return err
	}
	if k.off = n; n < len(k.left) {
		k.full.Store(true)
		return nil
	}
	k.emptied()
	return nil
}

// emptied gives the memory back.
func (k *Socket) emptied() {
	if k.batch != nil && cap(k.left) <= batchSize {
		batches.Put(k.batch)
	}
	k.batch, k.left, k.off = nil, nil, 0
}

// give hands the kernel what it takes of p now.
func (k *Socket) give(p []byte) (int, error) {
	k.p, k.n, k.err = p, 0, nil
	err := k.raw.Write(k.tries)
	k.p = nil
	if err == nil {
		err = k.err
	}
	return k.n, err
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
		k.emptied()
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
