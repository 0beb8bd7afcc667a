package link

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"assay.dev"
)

// Kind names a message.
type Kind string

// From the agent to a proxy.
const (
	KindConfigure   Kind = "configure"   // Configure, with the listeners on first contact
	KindServices    Kind = "services"    // Services
	KindTable       Kind = "table"       // Table, with the mapping's descriptor
	KindBundle      Kind = "bundle"      // Bundle
	KindCertificate Kind = "certificate" // Certificate: the answer to a CSR
	KindProbed      Kind = "probed"      // Probed: the answer to a probe
	KindRenew       Kind = "renew"       // empty: make a new key and send a CSR (the artifacts changed)
	KindWatch       Kind = "watch"       // Watch: which requests to tell of
	KindReportNow   Kind = "report-now"  // empty: send a Report with the same ID
	KindDrain       Kind = "drain"       // Drain: finish, then exit; with a descriptor, give connections to the successor on it
	KindInherit     Kind = "inherit"     // empty, with a descriptor: serve the connections that a predecessor sends on it
)

// From a proxy to its successor, on a socket pair that the agent made for them.
const KindConnection Kind = "connection" // Connection, with its descriptor

// From a proxy to the agent.
const (
	KindHello   Kind = "hello"   // Hello, with the listeners when it was orphaned
	KindReady   Kind = "ready"   // empty: accepting
	KindCSR     Kind = "csr"     // CSR
	KindProbe   Kind = "probe"   // Probe: asks whether a client is the host's kubelet
	KindAck     Kind = "ack"     // Ack: after each services, table, bundle; the kernel lets through what is acknowledged
	KindReport  Kind = "report"  // Report
	KindFinding Kind = "finding" // assay.Finding
	KindRecords Kind = "records" // Records: requests that a watch asked for
)

// Message is one packet. ID pairs an answer with its question; 0 asks nothing.
type Message struct {
	Kind  Kind   `json:"kind"`
	ID    uint64 `json:"id,omitempty"`
	Body  []byte `json:"-"` // JSON
	Files []int  `json:"-"` // descriptors; whoever receives a message calls Take or Discard
}

// Listener roles, in the order of the descriptors in Configure and Hello.
const (
	ListenOutbound = "outbound" // TCP, where the kernel redirects the workload's own connections
	ListenInbound  = "inbound"  // TCP, where the kernel redirects connections to the workload
	ListenDNSUDP   = "dns-udp"  // UDP socket bound in the workload's namespace
	ListenDNSTCP   = "dns-tcp"
)

// Configure tells a proxy who it serves.
type Configure struct {
	Workload    string                `json:"workload"` // assay.Workload.ID
	Identity    assay.Identity        `json:"identity"`
	Addrs       []netip.Addr          `json:"addrs"`       // the workload's own
	Config      assay.NamespaceConfig `json:"config"`      // until the first Services, and then theirs
	Listeners   []string              `json:"listeners"`   // roles, in the order of the descriptors; empty when the proxy has them
	AgentSocket string                `json:"agentSocket"` // of the next agent; empty: there is none, and the proxy ends with this one
	// OwnMark is set on every socket that the proxy opens, so that capture lets it
	// pass; ReturnMark is what the namespace's rules put on the application's
	// answers to it. The proxy only uses OwnMark.
	OwnMark    uint32 `json:"ownMark"`
	ReturnMark uint32 `json:"returnMark"`
	// MeshPrefixes are the networks in which every address is meshed or nothing: an
	// address in one of them that is not in the table is refused, not dialled.
	MeshPrefixes []netip.Prefix `json:"meshPrefixes"`
	// Gateways are the host's own addresses, from which its processes reach their
	// workloads. They are nobody's of the mesh.
	Gateways []netip.Addr `json:"gateways,omitempty"`
	// Probes are the workload's ports at which the host's kubelet asks in plaintext
	// whether it lives.
	Probes []uint16 `json:"probes,omitempty"`
	// Metrics is the workload's port at which its agent itself serves metrics, to whoever is not in the mesh
	// in plaintext; 0: none.
	Metrics uint16 `json:"metrics,omitempty"`
	DNS     DNS    `json:"dns"`
	// Zone is where the workload's host is; endpoints in the same one are preferred.
	Zone string `json:"zone,omitempty"`
	// Nodes are the addresses of nodes, at which services have ports, too.
	Nodes []netip.Addr `json:"nodes,omitempty"`
	// Host is the ID of the workload's host: some services have endpoints for its clients alone.
	Host string `json:"host,omitempty"`
	// CertificateWait bounds how long a mesh connection waits for the first
	// certificate. 0 means 2 s.
	CertificateWait time.Duration `json:"certificateWait,omitempty"`
	// Transition says that not everybody has heard yet that the workload is in the mesh, or
	// that it is not any more: plaintext of the mesh's own is served.
	Transition bool `json:"transition,omitempty"`
	// OlderGrace is how long plaintext that was let in before the namespace was strict may go
	// on. 0 means ten minutes.
	OlderGrace time.Duration `json:"olderGrace,omitempty"`
	// Successor says that another proxy accepts on the listeners still: accept when
	// there is a certificate, not before.
	Successor bool `json:"successor,omitempty"`
}

// DNS is how names that are no service's are resolved.
type DNS struct {
	Upstreams []netip.AddrPort `json:"upstreams,omitempty"` // tried in order
	Domain    string           `json:"domain"`              // cluster-like suffix: NAME.NAMESPACE.svc.DOMAIN
}

// Services is a delta of what the workload may dial.
type Services struct {
	Version uint64          `json:"version"`
	Full    bool            `json:"full,omitempty"` // forget what is not in Upsert and Routes
	Upsert  []assay.Service `json:"upsert,omitempty"`
	Remove  []string        `json:"remove,omitempty"` // Service.Key
	// Patch is what has become of services whose endpoints alone are others. It is for
	// proxies that say that they know it.
	Patch []Patch `json:"patch,omitempty"`
	// Routes are those that this workload's requests may meet; the same holds for
	// them, by Route.Key.
	Routes       []assay.Route          `json:"routes,omitempty"`
	RemoveRoutes []string               `json:"removeRoutes,omitempty"`
	Config       *assay.NamespaceConfig `json:"config,omitempty"` // when the namespace's settings changed
}

// Table announces a new address table; its mapping is the message's descriptor.
type Table struct {
	Version uint64 `json:"version"`
}

// Bundle is the trust bundle: the roots in DER.
type Bundle struct {
	Version uint64   `json:"version"`
	Roots   [][]byte `json:"roots"`
}

// Probe asks who holds the host's end of a connection from one of its own addresses.
type Probe struct {
	Client netip.AddrPort `json:"client"`
	Server netip.AddrPort `json:"server"` // as dialled
}

// Probed says whether the kubelet does.
type Probed struct {
	Kubelet bool `json:"kubelet"`
}

// CSR asks for a certificate for a fresh key.
type CSR struct {
	DER []byte `json:"der"`
}

// Certificate answers a CSR with a chain, leaf first, or with why there is none.
type Certificate struct {
	Chain   [][]byte      `json:"chain,omitempty"`
	RenewAt time.Time     `json:"renewAt,omitzero"`
	Refused string        `json:"refused,omitempty"`
	Remedy  string        `json:"remedy,omitempty"`
	Retry   time.Duration `json:"retry,omitempty"` // when to ask again after a refusal
}

// Drain asks a proxy to finish what it has and exit. Without a descriptor, idle
// connections are closed. With one, a successor accepts on the same listeners: what
// can move between two requests is sent there, and what cannot goes on until the
// deadline. Said again, it can bring the deadline forward and name another successor.
type Drain struct {
	Deadline time.Time `json:"deadline"`
}

// Connection is one HTTP/1 connection between two requests.
type Connection struct {
	Role  string `json:"role"`            // of the listener that accepted it
	First []byte `json:"first,omitempty"` // what was read of the next request
}

// Watch replaces what a proxy watches for.
type Watch struct {
	List []assay.Watch `json:"list"`
}

// Records are requests that met a watch, and how many more did that its rate or the
// queue left out.
type Records struct {
	List    []assay.Record    `json:"list"`
	Dropped map[string]uint64 `json:"dropped,omitempty"` // by watch
}

// MaxRecords bounds the records of one message.
const MaxRecords = 64

// Hello introduces a proxy.
type Hello struct {
	PID       int       `json:"pid"`
	Build     string    `json:"build"`
	Workload  string    `json:"workload,omitempty"`  // empty before the first Configure
	Listeners []string  `json:"listeners,omitempty"` // roles of the attached descriptors
	Services  uint64    `json:"services,omitempty"`  // versions in use
	Table     uint64    `json:"table,omitempty"`
	Bundle    uint64    `json:"bundle,omitempty"`
	Serial    string    `json:"serial,omitempty"` // of the certificate in use, hexadecimal
	NotAfter  time.Time `json:"notAfter,omitzero"`
	Draining  bool      `json:"draining,omitempty"`
	Patches   bool      `json:"patches,omitempty"` // it knows Services.Patch
}

// Ack tells which versions a proxy uses now.
type Ack struct {
	Services uint64 `json:"services,omitempty"`
	Table    uint64 `json:"table,omitempty"`
	Bundle   uint64 `json:"bundle,omitempty"`
	Serial   string `json:"serial,omitempty"`
}

// Report is everything that a proxy has counted since it started.
type Report struct {
	Started  time.Time       `json:"started"`
	Signals  []assay.Signals `json:"signals"`
	Counters assay.Counters  `json:"counters"`
}

// MaxSignals bounds the series of a report. A proxy keeps far fewer.
const MaxSignals = 20_000

// UnmarshalJSON reads a report and stops at MaxSignals: a series takes two hundred
// times the memory of the "{}," that makes one.
func (r *Report) UnmarshalJSON(b []byte) error {
	type plain Report
	raw := struct {
		*plain
		Signals json.RawMessage `json:"signals"`
	}{plain: (*plain)(r)}
	r.Signals = nil
	if err := json.Unmarshal(b, &raw); err != nil || len(raw.Signals) == 0 || raw.Signals[0] != '[' {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(raw.Signals))
	if _, err := d.Token(); err != nil {
		return err
	}
	for d.More() {
		if len(r.Signals) == MaxSignals {
			return fmt.Errorf("more than %d series", MaxSignals)
		}
		var s assay.Signals
		if err := d.Decode(&s); err != nil {
			return err
		}
		r.Signals = append(r.Signals, s)
	}
	return nil
}
