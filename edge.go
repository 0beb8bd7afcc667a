package assay

import "time"

// Party is one end of an edge.
type Party struct {
	Identity  Identity `json:"identity,omitzero"`   // nobody: outside the mesh
	Artifacts Digest   `json:"artifacts,omitempty"` // ArtifactSet.Digest, as its certificate said
}

// Edge is who talks to whom, put together from what the proxies at both ends counted.
// Two edges differ in at least one of Client, Server, Service, Port, Protocol,
// Security, Reason, Remote and RemoteBy.
type Edge struct {
	Client   Party    `json:"client"`
	Server   Party    `json:"server"`
	Service  string   `json:"service,omitempty"` // "NAMESPACE/NAME", "" for an address without a service
	Port     uint16   `json:"port,omitempty"`    // as dialled by the client
	Protocol Protocol `json:"protocol"`
	Security Security `json:"security"`
	Reason   string   `json:"reason,omitempty"` // why it is not mutual TLS
	// Remote is who the end that is nobody of the mesh is: an address or a name.
	Remote   string `json:"remote,omitempty"`
	RemoteBy string `json:"remoteBy,omitempty"` // as in SignalKey
	// SeenBy names the ends that counted it: Outbound is the client's proxy, Inbound
	// the server's. Between meshed workloads it is both, or one of them lies or has
	// not reported yet.
	SeenBy []Direction `json:"seenBy"`
	// The numbers are the client's proxy's where there is one, else the server's; for
	// the life of the proxies.
	Requests  uint64 `json:"requests"`
	Failures  uint64 `json:"failures"`
	Opened    uint64 `json:"opened"`
	Open      int64  `json:"open"`
	BytesUp   uint64 `json:"bytesUp"`   // from the client
	BytesDown uint64 `json:"bytesDown"` // to the client
	// Of traffic beside the proxies only.
	PacketsUp   uint64    `json:"packetsUp,omitempty"`
	PacketsDown uint64    `json:"packetsDown,omitempty"`
	Latency     Latency   `json:"latency"`
	FirstSeen   time.Time `json:"firstSeen"`
	LastSeen    time.Time `json:"lastSeen"`
	// Counted is when the numbers were, by the clock of the host that counted last. A rate
	// is a difference of numbers over the difference of it.
	Counted time.Time `json:"counted,omitzero"`
}

// Reasons of what passes beside the proxy: the kernel counts it, the agent lists it.
const (
	ReasonUDP      = "udp"
	ReasonUDPLite  = "udp-lite"
	ReasonSCTP     = "sctp"
	ReasonDCCP     = "dccp"
	ReasonICMP     = "icmp"
	ReasonOtherIP  = "ip"
	ReasonExcluded = "excluded-port"      // TCP on a port that the namespace excludes
	ReasonOlder    = "older-than-capture" // TCP that was there before the capture
	ReasonEscaped  = "escaped"            // TCP that should have been captured: somebody avoids it
)

// Beside reports whether a reason is that of traffic beside the proxy.
func Beside(reason string) bool {
	switch reason {
	case ReasonUDP, ReasonUDPLite, ReasonSCTP, ReasonDCCP, ReasonICMP, ReasonOtherIP, ReasonExcluded, ReasonOlder, ReasonEscaped:
		return true
	}
	return false
}
