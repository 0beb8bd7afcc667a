package assay

import (
	"maps"
	"math/bits"
	"slices"
	"time"
)

// Direction is a connection's as the workload sees it.
type Direction string

const (
	Inbound  Direction = "inbound"
	Outbound Direction = "outbound"
)

// Security is how a connection was protected.
type Security string

const (
	MutualTLS Security = "mtls"
	Plaintext Security = "plaintext"
)

// SignalKey is the label set of golden signals. A proxy bounds how many it
// keeps; what is over the bound is counted under Overflow.
type SignalKey struct {
	Direction     Direction `json:"direction"`
	Peer          Identity  `json:"peer,omitzero"`           // nobody: not meshed
	PeerArtifacts Digest    `json:"peerArtifacts,omitempty"` // as the peer's leaf said
	Service       string    `json:"service,omitempty"`       // "NAMESPACE/NAME", "" for an address without a service
	Port          uint16    `json:"port,omitempty"`          // as dialled by the client
	Protocol      Protocol  `json:"protocol"`
	Security      Security  `json:"security"`
	Reason        string    `json:"reason,omitempty"` // why it is not mutual TLS
	// Remote says who the peer is when it is nobody of the mesh: an address, or the
	// name that it was reached by. Bounded like the rest; Overflow is everybody else.
	Remote   string `json:"remote,omitempty"`
	RemoteBy string `json:"remoteBy,omitempty"` // how a name is known: ByDNS, BySNI …; "": it is an address
}

// Overflow is the Service, or the Remote, of the series that takes what is over the
// bound.
const Overflow = "(overflow)"

// Signals are the golden signals of one key. Counters only grow for the life of
// the proxy process; gauges are now.
type Signals struct {
	SignalKey
	Requests uint64 `json:"requests"` // HTTP exchanges, or opaque connections ended
	Failures uint64 `json:"failures"` // 5xx, resets and refusals among them
	Opened   uint64 `json:"opened"`   // connections or streams begun
	BytesIn  uint64 `json:"bytesIn"`  // from the peer
	BytesOut uint64 `json:"bytesOut"` // to the peer
	Open     int64  `json:"open"`     // connections now
	InFlight int64  `json:"inFlight"` // requests now
	// Of traffic that passes beside the proxy only, where bytes are those of frames on
	// the link and requests are not known.
	PacketsIn  uint64  `json:"packetsIn,omitempty"`
	PacketsOut uint64  `json:"packetsOut,omitempty"`
	Latency    Latency `json:"latency"` // request head read to response ended; connection life when opaque
	// Of gRPC calls: how many ended with which status, by name; messages of both
	// directions.
	GRPC        map[string]uint64 `json:"grpc,omitempty"`
	MessagesIn  uint64            `json:"messagesIn,omitempty"`
	MessagesOut uint64            `json:"messagesOut,omitempty"`

	FirstSeen time.Time `json:"firstSeen"`
	LastSeen  time.Time `json:"lastSeen"`
}

// GRPCCodes is how many status codes gRPC defines.
const GRPCCodes = 17

var grpcCodes = [GRPCCodes + 1]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
	"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
	"DATA_LOSS", "UNAUTHENTICATED", "none",
}

// GRPCCode returns the name of a gRPC status; one that does not exist is "none", as is
// that of a call which ended without.
func GRPCCode(code int) string {
	if code < 0 || code > GRPCCodes {
		code = GRPCCodes
	}
	return grpcCodes[code]
}

// IsGRPCCode reports whether GRPCCode returns name.
func IsGRPCCode(name string) bool { return slices.Contains(grpcCodes[:], name) }

// Latency is a histogram of durations.
type Latency struct {
	Buckets [LatencyBuckets]uint64 `json:"buckets"`
	Sum     time.Duration          `json:"sum"` // nanoseconds
}

// LatencyBuckets is the number of buckets: two to each power of two from 16 us
// to 67 s, the last one open.
const LatencyBuckets = 45

// LatencyBucket returns the bucket of d.
func LatencyBucket(d time.Duration) int {
	us := uint64(max(d, 0) / time.Microsecond)
	if us < 16 {
		return 0
	}
	n := bits.Len64(us) // us is in [2^(n-1), 2^n)
	i := 1 + (n-5)*2 + int(us>>(n-2)&1)
	return min(i, LatencyBuckets-1)
}

// LatencyBound returns the exclusive upper bound of bucket i; the last bucket
// has none and returns 0.
func LatencyBound(i int) time.Duration {
	if i >= LatencyBuckets-1 {
		return 0
	}
	if i == 0 {
		return 16 * time.Microsecond
	}
	low := 16 << ((i - 1) / 2)
	if (i-1)%2 == 0 {
		return time.Duration(low+low/2) * time.Microsecond
	}
	return time.Duration(2*low) * time.Microsecond
}

// Add counts other into l.
func (l *Latency) Add(other *Latency) {
	for i := range l.Buckets {
		l.Buckets[i] += other.Buckets[i]
	}
	l.Sum += other.Sum
}

// Count returns the number of observations.
func (l *Latency) Count() uint64 {
	var n uint64
	for _, b := range l.Buckets {
		n += b
	}
	return n
}

// Quantile returns the upper bound of the bucket that holds quantile q (0 to 1),
// and 0 when there is no observation.
func (l *Latency) Quantile(q float64) time.Duration {
	total := l.Count()
	if total == 0 {
		return 0
	}
	rank := max(uint64(q*float64(total)+0.5), 1)
	var seen uint64
	for i, b := range l.Buckets {
		seen += b
		if seen >= rank {
			if i == LatencyBuckets-1 {
				i--
			}
			return LatencyBound(i)
		}
	}
	return LatencyBound(LatencyBuckets - 2)
}

// Counters are a proxy's counts that belong to no peer.
type Counters struct {
	Handshakes        uint64            `json:"handshakes"`                  // mutual TLS handshakes completed
	HandshakeFailures map[string]uint64 `json:"handshakeFailures,omitempty"` // by reason
	Detections        map[string]uint64 `json:"detections,omitempty"`        // by outcome
	Refusals          map[string]uint64 `json:"refusals,omitempty"`          // connections refused, by reason; "kernel-…" by the kernel, with no proxy asked
	Decisions         []Decided         `json:"decisions,omitempty"`         // of resilience; docs/resilience.md lists them
	Unfit             []Unfit           `json:"unfit,omitempty"`             // endpoints now, as this proxy sees them; at most MaxUnfit
}

// Decided counts one kind of decision about one service's requests.
type Decided struct {
	Service  string `json:"service,omitempty"` // "NAMESPACE/NAME", "" for an address without a service
	Decision string `json:"decision"`
	Count    uint64 `json:"count"`
}

// MaxUnfit bounds the endpoints of Counters.Unfit.
const MaxUnfit = 64

// WholeService is the Addr of an Unfit without a Workload: the client's proxy asks the
// service no more, whoever its endpoints are, for its circuit is open.
const WholeService = "(service)"

// Unfit is an endpoint that a client's proxy found wanting, or a service.
type Unfit struct {
	Service  string    `json:"service"`
	Workload string    `json:"workload"` // Workload.ID; "": see WholeService
	Addr     string    `json:"addr"`     // with the port
	Ejected  bool      `json:"ejected"`  // it is given nothing; otherwise too many others are ejected
	Why      string    `json:"why"`
	Until    time.Time `json:"until,omitzero"` // when a request probes it
}

// Add counts other, of the same key, into s.
func (s *Signals) Add(other *Signals) {
	s.Requests += other.Requests
	s.Failures += other.Failures
	s.Opened += other.Opened
	s.BytesIn += other.BytesIn
	s.BytesOut += other.BytesOut
	s.Open += other.Open
	s.InFlight += other.InFlight
	s.PacketsIn += other.PacketsIn
	s.PacketsOut += other.PacketsOut
	s.Latency.Add(&other.Latency)
	s.GRPC = sumOf(s.GRPC, other.GRPC)
	s.MessagesIn += other.MessagesIn
	s.MessagesOut += other.MessagesOut
	if other.FirstSeen.Before(s.FirstSeen) {
		s.FirstSeen = other.FirstSeen
	}
	if other.LastSeen.After(s.LastSeen) {
		s.LastSeen = other.LastSeen
	}
}

// sumOf adds counts by name. It changes neither of the two.
func sumOf(a, b map[string]uint64) map[string]uint64 {
	if len(b) == 0 {
		return a
	}
	sum := maps.Clone(a)
	if sum == nil {
		sum = map[string]uint64{}
	}
	for name, n := range b {
		sum[name] += n
	}
	return sum
}

// Plus returns the sum of two proxies' counts.
func (c Counters) Plus(other *Counters) Counters {
	c.Handshakes += other.Handshakes
	c.HandshakeFailures = sumOf(c.HandshakeFailures, other.HandshakeFailures)
	c.Detections = sumOf(c.Detections, other.Detections)
	c.Refusals = sumOf(c.Refusals, other.Refusals)
	if len(other.Decisions) > 0 {
		decisions := slices.Clone(c.Decisions)
		for _, d := range other.Decisions {
			i := slices.IndexFunc(decisions, func(x Decided) bool { return x.Service == d.Service && x.Decision == d.Decision })
			if i < 0 {
				decisions = append(decisions, d)
			} else {
				decisions[i].Count += d.Count
			}
		}
		c.Decisions = decisions
	}
	c.Unfit = other.Unfit // what is now, by who looked last
	return c
}

// Finding is something that a person should look at.
type Finding struct {
	Time     time.Time `json:"time"`
	Workload string    `json:"workload"` // Workload.ID of the one that saw it
	Kind     string    `json:"kind"`     // "plaintext-from-meshed", "identity-mismatch", …
	Subject  string    `json:"subject"`  // what it is about: an address, an identity
	Detail   string    `json:"detail"`
	Remedy   string    `json:"remedy,omitempty"`
}
