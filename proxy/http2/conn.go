package http2

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
	"golang.org/x/net/http2/hpack"
)

// Config bounds what a connection may cost. Zero fields take the defaults in parentheses.
type Config struct {
	Limits Limits
	// MaxStreams is how many streams an application may have open on a connection (1000).
	MaxStreams int
	// HeadTimeout bounds how long a preface, or a header block, may take (60 s).
	HeadTimeout time.Duration
	// A peer that has streams and is silent for PingEvery is asked whether it is there,
	// and given up after PingTimeout more. An application that is stopped in a debugger
	// for a while must live, and gRPC servers take frequent PINGs for abuse: (2 min for
	// clients, 5 min 10 s for servers; 1 min).
	PingEvery, PingTimeout time.Duration
	// StallBytes are how many bytes may wait for windows that are not opened before the
	// streams that have waited for StallTime are reset (8 MiB, 1 min). A reader that
	// merely pauses is left alone.
	StallBytes int
	StallTime  time.Duration
	// ConnMemory is how many bytes that were received and not taken a connection may hold
	// (32 MiB), and Memory what all of them may that share it; nil: there is no such limit.
	ConnMemory int
	Memory     *Memory
}

func (c Config) withDefaults(server bool) Config {
	c.Limits = c.Limits.WithDefaults()
	if c.MaxStreams <= 0 {
		c.MaxStreams = 1000
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.HeadTimeout, time.Minute)
	def(&c.PingTimeout, time.Minute)
	def(&c.StallTime, time.Minute)
	if server {
		def(&c.PingEvery, 2*time.Minute)
	}
	def(&c.PingEvery, 5*time.Minute+10*time.Second)
	if c.StallBytes <= 0 {
		c.StallBytes = 8 << 20
	}
	if c.ConnMemory <= 0 {
		c.ConnMemory = 32 << 20
	}
	return c
}

// conn is one connection with an application, in either role.
type conn struct {
	server bool // the application is the client
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	d      Dispatcher // server only
	in     *Inbound   // else
	key    poolKey
	faults Observer // told of the connection's refusal; nil for nobody

	load  atomic.Int32 // streams that have the connection, for the pool
	limit atomic.Int32 // that the application allows
	shy   atomic.Bool  // takes no new streams

	// The reader's own.
	item    *poolItem
	r, w    int // what was read and not handled: item.mem[r:w]
	big     bool
	readErr error
	readFn  func(fd uintptr) bool // bound once
	dec     *hpack.Decoder
	batch   mux.Batch
	fields  []Field // of the messages of this batch
	block   block
	head    int // bytes of names and values in the block so far
	fresh   []*stream
	dirty   []*stream
	idle    int // sweeps without a stream; Inbound.mu

	mu       sync.Mutex
	tcp      nowait.Conn // nil while it is dialled
	raw      syscall.RawConn
	end      error // why it ends; nil while it lives
	stopped  bool
	kicked   bool // the read deadline is a signal
	deadline time.Time
	prefaced bool
	settled  bool // the peer's SETTINGS were read
	streams  table
	lastID   uint32 // the highest stream of the peer, or of ours
	resets   ring   // streams that we reset: what is on its way for them is dropped
	free     *stream
	nfree    int

	// The peer's settings.
	peerMax     int
	peerWindow  int
	peerFrame   int
	peerConnect bool // extended CONNECT

	sendWin, recvWin, recvOwed int

	// What it holds: memory.go.
	held        int
	queuedBytes int          // of out, spare and left
	told        atomic.Int64 // what Memory knows of held
	window      int          // that the peer's streams begin with, as far as it knows
	asked       int          // and will when it has acknowledged
	acks        int          // of our SETTINGS that are to come
	resized     time.Duration

	out, spare []byte // queued by all; being written, or kept for the next turn
	left       []byte // what the kernel did not take of the last one
	writing    bool
	tryFn      func(fd uintptr) bool
	dripFn     func(fd uintptr) bool
	flushFn    func()
	p          []byte // argument and results of tryFn
	n          int
	tryErr     error
	queued     bool // mux's reader will call Flush
	enc        *hpack.Encoder
	scratch    []Field
	known      []bool
	names      interner
	values     interner
	ready      queue // streams that wait for room in out
	starved    queue // streams that wait for the connection's window
	pending    queue // streams that wait for the application to allow one more

	flood flood
	alive alive
	timer *time.Timer   // of limits
	armed time.Duration // when it is due; 0: not running
	bye   goodbye
	// batching says that the reader handles a batch, and flushes it afterwards.
	batching bool
	tasks    int // goroutines that run beside the reader's
	noTasks  sync.Cond
	closed   bool // the socket is: nothing is written any more
}

// block is a header block that is being read.
type block struct {
	active bool
	stream uint32
	end    bool // END_STREAM
	self   bool // it depends on itself
	bytes  int
	frames int
	start  int      // of its fields in conn.fields
	bad    *Refusal // what its size earned it
}

// goodbye is how far a drain has come.
type goodbye struct {
	asked bool // GOAWAY without a last stream, and a PING, were sent
	said  bool // the last stream was named
	last  uint32
	heard bool // the peer's GOAWAY
	peer  uint32
}

var (
	// ErrStopped is returned by Serve when its context ended.
	ErrStopped = errors.New("http2: stopped")
	errDrained = errors.New("http2: drained")
	errIdle    = errors.New("http2: idle")

	longAgo = time.Unix(1, 0)
)

// lingerTime bounds how long a connection that we ended is read, so that our last words
// are not destroyed by a reset for bytes that arrived late.
const lingerTime = 2 * time.Second

// connWindow is what a peer may have in flight on all streams together. It is given back
// as it arrives: what bounds memory are the streams' windows, and one that nobody reads
// must not stop the others.
const connWindow = 16 << 20

func newConn(ctx context.Context, server bool, cfg Config) *conn {
	c := &conn{server: server, cfg: cfg.withDefaults(server),
		peerMax: 100, peerWindow: initialWindow, peerFrame: maxFrame, sendWin: initialWindow, recvWin: connWindow,
		window: initialWindow, asked: initialWindow, acks: 1}
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.noTasks.L = &c.mu
	c.limit.Store(int32(c.peerMax))
	c.readFn, c.tryFn, c.dripFn, c.flushFn = c.readFD, c.tryFD, c.dripFD, c.flusher
	c.dec = hpack.NewDecoder(4096, c.emit)
	c.dec.SetMaxStringLength(2 * c.cfg.Limits.Head)
	c.enc = hpack.NewEncoder((*outWriter)(c))
	c.prefaced = !server
	c.bye.peer = maxWindow
	list := []setting{{settingMaxStreams, uint32(c.cfg.MaxStreams)}, {settingMaxHeadList, uint32(c.cfg.Limits.Head + 32*c.cfg.Limits.Fields)}, {settingConnect, 1}}
	if !server {
		c.out = append(c.out, preface...)
		list = []setting{{settingPush, 0}, {settingMaxHeadList, uint32(c.cfg.Limits.Head + 32*c.cfg.Limits.Fields)}}
	}
	c.out = appendSettings(c.out, list...)
	c.out = appendWindow(c.out, 0, connWindow-initialWindow)
	c.cfg.Memory.join(c)
	return c
}

// open gives the connection its socket.
func (c *conn) open(tcp nowait.Conn) error {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil || c.stopped {
		return net.ErrClosed
	}
	c.tcp, c.raw = tcp, raw
	if c.server {
		c.setDeadline(time.Now().Add(c.cfg.HeadTimeout))
	}
	c.flush()
	return nil
}

// serve reads until the connection ends, tells every stream, and closes it.
func (c *conn) serve() error {
	err := c.read()
	c.mu.Lock()
	c.fail(err)
	err = c.end
	c.shy.Store(true)
	c.alive.stop()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.breakStreams()
	c.mu.Unlock()
	c.cancel()
	c.farewell()
	c.mu.Lock()
	c.leave()
	c.tcp.Close()
	c.await()
	c.mu.Unlock()
	c.item.release()
	c.item = nil
	if why, ok := errors.AsType[*Refusal](err); ok {
		if c.faults != nil {
			c.faults.Refused(why)
		}
		return err
	}
	if err == errDrained || err == errIdle || err == io.EOF {
		return nil
	}
	return err
}

// read is the reader: it returns why the connection ends.
func (c *conn) read() error {
	for {
		if err := c.fill(); err != nil {
			return err
		}
		if !c.process() {
			return errDrained // fail has said why
		}
	}
}

// fill waits for bytes. Its frame is what an idle connection's stack consists of.
func (c *conn) fill() error {
	for {
		err := c.raw.Read(c.readFn)
		if err == nil {
			return c.readErr
		}
		if err = c.notRead(err); err != nil {
			return err
		}
	}
}

// readFD reads once the socket has something: no buffer is held before.
func (c *conn) readFD(fd uintptr) bool {
	if c.item == nil {
		size := classes[1]
		if c.big {
			size = classes[3]
		}
		c.item = take(size)
	}
	n, err := nowait.Read(fd, c.item.mem[c.w:])
	if n == 0 && err == nil {
		err = io.EOF
	}
	c.w += n
	if c.w == 0 {
		c.item.release()
		c.item = nil
	}
	c.readErr = err
	return err != nowait.Again
}

// notRead says why fill did not wait to its end; nil means that it should go on.
func (c *conn) notRead(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.end != nil:
		return c.end
	case c.stopped:
		return ErrStopped
	case c.kicked:
		c.kicked = false
		c.tcp.SetReadDeadline(c.deadline)
		return nil
	case !c.prefaced || !c.settled:
		return ErrPrefaceSlow
	case c.block.active:
		return ErrHeadSlow
	}
	c.deadline = time.Time{}
	c.tcp.SetReadDeadline(c.deadline)
	return nil
}

// setDeadline bounds reads; mu is held.
func (c *conn) setDeadline(t time.Time) {
	c.deadline = t
	if !c.kicked && c.tcp != nil {
		c.tcp.SetReadDeadline(t)
	}
}

// kick calls the reader away from what it waits for; mu is held.
func (c *conn) kick() {
	c.kicked = true
	if c.tcp != nil {
		c.tcp.SetReadDeadline(longAgo)
	}
}

func (c *conn) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.shy.Store(true)
	c.kick()
}

// fail ends the connection for err, unless it has ended; mu is held. A refusal is told to
// the peer.
func (c *conn) fail(err error) {
	if c.end != nil {
		return
	}
	c.end = err
	c.shy.Store(true)
	if why, ok := err.(*Refusal); ok {
		c.out = appendGoaway(c.out, c.peerLast(), why.Code, why.Reason)
	}
	if err == errIdle {
		c.out = appendGoaway(c.out, 0, NoError, "")
	}
	c.kick()
}

// peerLast is the highest stream of the peer that was looked at.
func (c *conn) peerLast() uint32 {
	switch {
	case !c.server:
		return 0
	case c.bye.said:
		return c.bye.last
	}
	return c.lastID
}

// farewell sends what is queued, when the peer may still listen, and gives it a moment to
// read that: closing a socket with unread bytes in it would make the kernel discard what
// is on its way.
func (c *conn) farewell() {
	c.mu.Lock()
	err := c.end
	_, refused := err.(*Refusal)
	if err == ErrStopped || !refused && err != errDrained && err != errIdle && err != io.EOF {
		// Whoever waits for an answer must not take a clean end for one.
		if err == ErrStopped {
			c.tcp.SetLinger(0)
		}
		c.mu.Unlock()
		return
	}
	c.tcp.SetDeadline(time.Now().Add(lingerTime))
	c.flush()
	c.await() // for the flusher, which the deadline bounds
	c.mu.Unlock()
	if err == io.EOF {
		return
	}
	c.tcp.CloseWrite()
	buf := take(classes[1])
	defer buf.release()
	for total := 0; total < 4<<20; {
		n, err := c.tcp.Read(buf.mem)
		if err != nil {
			return
		}
		total += n
	}
}

// leave says that nothing is written any more, or held; mu is held.
func (c *conn) leave() {
	c.closed = true
	c.tell(-c.told.Load())
	c.cfg.Memory.leave(c)
}

// start runs f, which ends with done, in a goroutine that the connection's end waits for;
// mu is held.
func (c *conn) start(f func()) {
	c.tasks++
	go f()
}

// done is the last call of such a goroutine; mu is held.
func (c *conn) done() {
	if c.tasks--; c.tasks == 0 {
		c.noTasks.Broadcast()
	}
}

// await waits until no such goroutine runs; mu is held, and released meanwhile.
func (c *conn) await() {
	for c.tasks > 0 {
		c.noTasks.Wait()
	}
}

// breakStreams tells every stream that the connection is over; mu is held.
func (c *conn) breakStreams() {
	for x := c.streams.any(); x != nil; x = c.streams.any() {
		c.remove(x)
		x.broken(c.end)
	}
	for _, q := range []*queue{&c.pending, &c.ready, &c.starved} {
		for x := q.pop(); x != nil; x = q.pop() {
			switch {
			case x.rst || x.over:
			case c.raw == nil:
				x.broken(c.end)
			default:
				x.unread() // it waited for its turn
			}
		}
	}
}

// drain lets the streams end and takes no new one; mu is held. The peer is first told
// that we will, and named the last stream when it has heard that, so that none is lost
// (RFC 9113 section 6.8).
func (c *conn) drain() {
	if c.bye.asked || c.end != nil {
		return
	}
	c.bye.asked = true
	c.out = appendGoaway(c.out, maxWindow, NoError, "draining")
	c.out = appendPing(c.out, 0, drainPing)
	c.alive.start(c)
	c.flush()
}

var drainPing = []byte("assay-by")

// sayBye names the last stream; mu is held.
func (c *conn) sayBye() {
	if c.bye.said || c.end != nil {
		return
	}
	c.bye.said, c.bye.last = true, c.lastID
	c.out = appendGoaway(c.out, c.lastID, NoError, "draining")
	c.maybeDrained()
}

func (c *conn) maybeDrained() {
	if c.bye.said && c.streams.n == 0 && len(c.fresh) == 0 {
		c.fail(errDrained)
	}
}

// ring remembers the last streams that we reset.
type ring struct {
	ids  [128]uint32
	next int
	lost time.Duration // when one was forgotten, and how recently it could have been reset
}

func (r *ring) add(id uint32) {
	slot := &r.ids[r.next%len(r.ids)]
	if *slot != 0 {
		r.lost = now()
	}
	*slot = id
	r.next++
}

// has reports whether id may have been reset by us.
func (r *ring) has(id uint32) bool {
	for _, x := range r.ids {
		if x == id {
			return true
		}
	}
	return r.lost != 0 && now()-r.lost < 10*time.Second
}
