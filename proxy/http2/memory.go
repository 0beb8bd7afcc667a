package http2

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// What peers send and nobody takes is held here. A stream's window bounds it for one
// stream; Memory and Config.ConnMemory bound it for all of them:
//
//   - From a quarter of either on, windows shrink: the peer's initial window is lowered, in
//     steps, so that all of its streams together may send as much as its share. What a
//     stream has sent is given back to it only as it is taken, as ever, so each one that
//     is read goes on.
//   - From three quarters on, whoever holds more than its share begins no new stream: it
//     is refused, unread.
//   - At the limit, streams that nobody takes are reset, the largest of the largest
//     connection first. A peer that ignores what it was told comes no further, but for
//     what one read brings.

// Memory is what the connections of one proxy may hold together. Nil bounds nothing.
type Memory struct {
	limit int64
	held  atomic.Int64

	mu    sync.Mutex
	conns map[*conn]struct{}
	busy  bool          // relieve runs
	after time.Duration // when it may again: the last time nobody had enough to give
}

// NewMemory makes one of so many bytes; 0 is 128 MiB.
func NewMemory(limit int) *Memory {
	if limit <= 0 {
		limit = 128 << 20
	}
	return &Memory{limit: int64(limit), conns: map[*conn]struct{}{}}
}

// Held returns how many bytes are held, but for a few of each connection.
func (m *Memory) Held() int { return int(m.held.Load()) }

func (m *Memory) join(c *conn) {
	if m != nil {
		m.mu.Lock()
		m.conns[c] = struct{}{}
		m.mu.Unlock()
	}
}

func (m *Memory) leave(c *conn) {
	if m != nil {
		m.mu.Lock()
		delete(m.conns, c)
		m.mu.Unlock()
	}
}

// uses reports whether more than so many quarters of m are held.
func (m *Memory) uses(quarters int64) bool {
	return m != nil && m.held.Load()*4 > m.limit*quarters
}

// share is what a connection may hold when all that there are hold as much.
func (m *Memory) share() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int(m.limit) / max(len(m.conns), 1)
}

// ask has connections give some back, unless they are asked already or had nothing a moment
// ago. The caller holds the lock of one.
func (m *Memory) ask() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.busy && now() >= m.after {
		m.busy = true
		time.AfterFunc(0, m.relieve)
	}
}

// relieve asks each connection once, those that hold most first, until there is room. What
// is queued for a peer that does not read nobody can give back: the next may have streams
// that can end.
func (m *Memory) relieve() {
	type holder struct {
		c    *conn
		told int64
	}
	var list []holder
	m.mu.Lock()
	for c := range m.conns {
		list = append(list, holder{c, c.told.Load()})
	}
	m.mu.Unlock()
	slices.SortFunc(list, func(a, b holder) int { return cmp.Compare(b.told, a.told) })
	for _, h := range list {
		if !m.uses(4) {
			break
		}
		h.c.giveUp()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy = false
	if m.uses(4) {
		m.after = now() + askEvery
	}
}

const (
	// tellEvery is by how much a connection's own count may differ from what Memory knows.
	tellEvery = 8 << 10
	// leastWindow is how far windows shrink.
	leastWindow = 1 << 10
	// resizeEvery is how often windows change at most.
	resizeEvery = 20 * time.Millisecond
	// askEvery is how often connections are asked for what they do not have.
	askEvery = 20 * time.Millisecond
)

// holds counts n more bytes; mu is held.
func (c *conn) holds(n int) {
	if c.closed {
		return
	}
	c.held += n
	if more := int64(c.held) - c.told.Load(); more >= tellEvery || more <= -tellEvery {
		c.tell(more)
	}
}

func (c *conn) tell(more int64) {
	c.told.Add(more)
	if c.cfg.Memory != nil {
		c.cfg.Memory.held.Add(more)
	}
}

// weigh counts what is queued for the peer; mu is held.
func (c *conn) weigh() {
	n := cap(c.out) + cap(c.spare) + cap(c.left)
	c.holds(n - c.queuedBytes)
	c.queuedBytes = n
}

// greedy reports whether c begins no new stream.
func (c *conn) greedy() bool { return int(c.told.Load()) > c.enough() }

// enough is what c may hold and still begin new streams.
func (c *conn) enough() int {
	most, m := c.cfg.ConnMemory/4*3, c.cfg.Memory
	if m.uses(3) {
		most = min(most, m.share()/2, c.cfg.ConnMemory/2)
	}
	return most
}

// relieve brings what c holds, and may come to hold, in line with what there is; mu is
// held. Streams may end; x, if there is one, is who brought the last bytes.
func (c *conn) relieve(x *stream) {
	m := c.cfg.Memory
	if c.end != nil {
		return
	}
	most := c.cfg.ConnMemory
	if m.uses(4) {
		most = min(most, m.share())
		m.ask()
	}
	if c.held > most {
		c.shed(most/8*7, ErrMemory, nil)
	}
	// A stream of which no whole head has come is in no table. One that is over, and may be
	// in the pool, has nothing.
	if c.held > most && x != nil && x.id == 0 && x.size() > 0 {
		x.refuse(ErrMemory)
	}
	c.resize()
}

// giveUp is a connection's part when the proxy's memory is used up.
func (c *conn) giveUp() {
	m := c.cfg.Memory
	c.mu.Lock()
	if c.end == nil && m.uses(4) {
		c.shed(max(c.held-int(m.held.Load()-m.limit/8*7), 0), ErrMemory, nil)
		c.flush()
	}
	c.mu.Unlock()
}

// shed resets streams, those that hold most first, until c holds no more than goal; only
// those that may says so of, unless it is nil.
func (c *conn) shed(goal int, why *Refusal, may func(x *stream) bool) {
	for c.held > goal {
		var most *stream
		size := 0
		weigh := func(x *stream) {
			if n := x.size(); n > size && !x.rst && !x.waiting && !x.fresh && (may == nil || may(x)) {
				most, size = x, n
			}
		}
		c.streams.each(weigh)
		c.pending.each(weigh)
		if most == nil {
			break
		}
		most.refuse(why)
		most.up.release()
		most.down.release()
	}
	c.tell(int64(c.held) - c.told.Load())
}

func (x *stream) size() int { return cap(x.up.b) + cap(x.down.b) }

// resize changes the peer's initial window when it is far from what fits.
func (c *conn) resize() {
	if c.acks > 0 {
		return // one change at a time
	}
	fit := c.fit()
	if near := 2*fit > c.window+1 && fit < 2*c.window; near && fit < initialWindow || fit == c.window {
		return
	}
	if t := now(); t-c.resized >= resizeEvery {
		c.resized = t
		c.asked = fit
		c.acks++
		c.out = appendSettings(c.out, setting{settingWindow, uint32(fit)})
	}
}

// fit is the window with which c's streams would fill half of what is left of its share.
func (c *conn) fit() int {
	m := c.cfg.Memory
	near := func(part int) bool {
		return c.held > c.cfg.ConnMemory/part || m != nil && m.held.Load() > m.limit/int64(part)
	}
	switch {
	case !near(8):
		return initialWindow
	case !near(4):
		return c.window
	}
	share := c.cfg.ConnMemory
	if m != nil {
		share = min(share, m.share())
	}
	fit := leastWindow
	for each := (share - c.held) / 2 / (c.streams.n + 1); 2*fit <= each && 2*fit <= initialWindow+1; {
		fit *= 2
	}
	return min(fit, initialWindow)
}

// onAck takes the peer's word that the last SETTINGS hold: windows of all its streams
// change by the difference, also below nothing (RFC 9113 section 6.9.2).
func (c *conn) onAck() {
	if c.acks == 0 {
		return
	}
	if c.acks--; c.acks > 0 {
		return
	}
	more := c.asked - c.window
	c.window = c.asked
	if more == 0 {
		return
	}
	c.streams.each(func(x *stream) {
		x.recvWin += more
		x.giveBack(0)
	})
}
