// Package golden counts the golden signals of one proxy: per series rate, errors,
// latency and saturation, and the counts that belong to no peer.
//
// It refuses to grow without bound: over the limit of series everything is counted
// under assay.Overflow, so that totals stay right.
//
// Invariants: a Series or a Counter is looked up once per connection and kept; what
// is done with it per request takes no lock and allocates nothing. Counts only grow
// for the life of the process. Goroutines: none.
package golden

import (
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
)

// MaxSeries is how many series a Recorder keeps before it overflows.
const MaxSeries = 1024

// maxReasons bounds the names in each group of counters; the names are our own
// constants, so reaching it is a bug that must not eat memory.
const maxReasons = 128

// Recorder holds all series of a proxy.
type Recorder struct {
	limit  int
	mu     sync.RWMutex
	series map[assay.SignalKey]*Series

	Handshakes        Counter
	HandshakeFailures Group
	Detections        Group
	Refusals          Group
}

// New makes a recorder of at most limit series (0: MaxSeries), not counting those
// of the overflow.
func New(limit int) *Recorder {
	if limit <= 0 {
		limit = MaxSeries
	}
	return &Recorder{limit: limit, series: map[assay.SignalKey]*Series{}}
}

// Series returns the series of key, or the overflow's.
func (r *Recorder) Series(key assay.SignalKey) *Series {
	r.mu.RLock()
	s := r.series[key]
	r.mu.RUnlock()
	if s != nil {
		return s
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s = r.series[key]; s != nil {
		return s
	}
	if len(r.series) >= r.limit {
		// A handful of combinations: direction, protocol and security are closed sets.
		key = assay.SignalKey{Direction: key.Direction, Service: assay.Overflow, Protocol: key.Protocol, Security: key.Security}
		if s = r.series[key]; s != nil {
			return s
		}
	}
	s = &Series{key: key, first: time.Now()}
	r.series[key] = s
	return s
}

// Signals returns a copy of all series in which something happened.
func (r *Recorder) Signals() []assay.Signals {
	r.mu.RLock()
	defer r.mu.RUnlock()
	list := make([]assay.Signals, 0, len(r.series))
	for _, s := range r.series {
		if one := s.signals(); one.Opened > 0 || one.Requests > 0 || one.InFlight > 0 {
			list = append(list, one)
		}
	}
	return list
}

// Counters returns a copy of the counts that belong to no peer.
func (r *Recorder) Counters() assay.Counters {
	return assay.Counters{
		Handshakes:        r.Handshakes.Load(),
		HandshakeFailures: r.HandshakeFailures.counts(),
		Detections:        r.Detections.counts(),
		Refusals:          r.Refusals.counts(),
	}
}

// Series is the golden signals of one key.
type Series struct {
	key      assay.SignalKey
	first    time.Time
	last     atomic.Int64 // Unix nanoseconds
	requests atomic.Uint64
	failures atomic.Uint64
	opened   atomic.Uint64
	bytesIn  atomic.Uint64
	bytesOut atomic.Uint64
	open     atomic.Int64
	inFlight atomic.Int64
	sum      atomic.Int64
	grpc     atomic.Pointer[calls] // nil until there was one
	bucket   [assay.LatencyBuckets]atomic.Uint64
}

// Key returns the label set.
func (s *Series) Key() assay.SignalKey { return s.key }

// Opened counts a connection or stream that began.
func (s *Series) Opened(now time.Time) {
	s.opened.Add(1)
	s.open.Add(1)
	s.last.Store(now.UnixNano())
}

// Closed counts its end.
func (s *Series) Closed() { s.open.Add(-1) }

// Begin counts a request in.
func (s *Series) Begin() { s.inFlight.Add(1) }

// End counts it out.
func (s *Series) End(took time.Duration, failed bool, now time.Time) {
	s.inFlight.Add(-1)
	s.requests.Add(1)
	if failed {
		s.failures.Add(1)
	}
	s.sum.Add(int64(took))
	s.bucket[assay.LatencyBucket(took)].Add(1)
	s.last.Store(now.UnixNano())
}

// Undo takes back a Begin: the request is tried elsewhere.
func (s *Series) Undo() { s.inFlight.Add(-1) }

// Forget takes back an Opened and a Begin: nothing came of the stream, and its
// connection is counted as what it turned out to be.
func (s *Series) Forget() {
	s.opened.Add(^uint64(0))
	s.open.Add(-1)
	s.inFlight.Add(-1)
}

// Refused counts a request that never got as far as a peer.
func (s *Series) Refused(now time.Time) {
	s.requests.Add(1)
	s.failures.Add(1)
	s.bucket[0].Add(1)
	s.last.Store(now.UnixNano())
}

// In counts bytes from the peer, Out bytes to it.
func (s *Series) In(n int)  { s.bytesIn.Add(uint64(n)) }
func (s *Series) Out(n int) { s.bytesOut.Add(uint64(n)) }

func (s *Series) signals() assay.Signals {
	out := assay.Signals{
		SignalKey: s.key,
		Requests:  s.requests.Load(),
		Failures:  s.failures.Load(),
		Opened:    s.opened.Load(),
		BytesIn:   s.bytesIn.Load(),
		BytesOut:  s.bytesOut.Load(),
		Open:      s.open.Load(),
		InFlight:  s.inFlight.Load(),
		FirstSeen: s.first,
		LastSeen:  s.first,
	}
	if n := s.last.Load(); n != 0 {
		out.LastSeen = time.Unix(0, n)
	}
	for i := range s.bucket {
		out.Latency.Buckets[i] = s.bucket[i].Load()
	}
	out.Latency.Sum = time.Duration(s.sum.Load())
	if c := s.grpc.Load(); c != nil {
		out.MessagesIn, out.MessagesOut = c.in.Load(), c.out.Load()
		for code := range c.status {
			if n := c.status[code].Load(); n > 0 {
				if out.GRPC == nil {
					out.GRPC = map[string]uint64{}
				}
				out.GRPC[assay.GRPCCode(code)] = n
			}
		}
	}
	return out
}

// Counter counts one thing.
type Counter struct{ atomic.Uint64 }

// Inc adds one.
func (c *Counter) Inc() { c.Add(1) }

// Group is a set of counters by name.
type Group struct {
	mu   sync.RWMutex
	list map[string]*Counter
}

// Counter returns the counter called name.
func (g *Group) Counter(name string) *Counter {
	g.mu.RLock()
	c := g.list[name]
	g.mu.RUnlock()
	if c != nil {
		return c
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.list) >= maxReasons {
		name = assay.Overflow
	}
	if c = g.list[name]; c == nil {
		if g.list == nil {
			g.list = map[string]*Counter{}
		}
		c = new(Counter)
		g.list[name] = c
	}
	return c
}

// Inc adds one to the counter called name.
func (g *Group) Inc(name string) { g.Counter(name).Inc() }

func (g *Group) counts() map[string]uint64 {
	g.mu.RLock()
	defer g.mu.RUnlock()
	out := make(map[string]uint64, len(g.list))
	for name, c := range g.list {
		out[name] = c.Load()
	}
	return out
}

// calls is what gRPC counts beyond requests.
type calls struct {
	in, out atomic.Uint64 // messages
	status  [assay.GRPCCodes + 1]atomic.Uint64
}

// GRPC counts a call that ended with a status, -1 for none, and its messages from and to
// the peer.
func (s *Series) GRPC(code int, in, out uint64) {
	c := s.grpc.Load()
	if c == nil {
		s.grpc.CompareAndSwap(nil, new(calls))
		c = s.grpc.Load()
	}
	c.in.Add(in)
	c.out.Add(out)
	if code < 0 || code >= assay.GRPCCodes {
		code = assay.GRPCCodes
	}
	c.status[code].Add(1)
}
