package demo

import (
	"net/netip"
	"time"

	"assay.dev"
	"assay.dev/demo/wire"
)

// evidence is everything that the acts of the check found out. judge decides on it.
type evidence struct {
	trustDomain string
	artifact    assay.Digest // of the bank's binary, as a set of one; computed by us

	ready  time.Duration // `assay up` to its readiness
	meshed time.Duration // the slowest `assay run` to a meshed workload

	members   []assay.Workload                 // at the height of the play
	addresses map[netip.Addr]map[name]struct{} // who ever lived where
	edges     []assay.Edge                     // as control tells them at the end
	presented map[netip.AddrPort]presentation  // by the workloads' inbound ports
	loads     []loadResult                     // each run of the load generator
	first     []probeResult                    // the server that speaks first, from fresh workloads
	outside   map[string]attempt               // plaintext from outside, by target
	script    assay.Workload                   // the workload that proves nothing
	findings  []assay.Finding                  // as control tells them
	outage    outage                           // control and agent killed
	wire      wire.Report                      // every packet on every link
	gateway   map[netip.Addr]struct{}          // our own addresses, outside the mesh
	left      []string                         // what was there after the end
}

// presentation is the certificate that a workload showed to us.
type presentation struct {
	Identity  assay.Identity
	Artifacts assay.Digest
	Err       error // no certificate, or one that the bundle does not vouch for
}

// loadResult is one run of the load generator.
type loadResult struct {
	act     string
	summary loadSummary
	err     error
}

// loadSummary is what `bank load` prints (examples/bank).
type loadSummary struct {
	Requests  uint64  `json:"requests"`
	Failures  uint64  `json:"failures"`
	Transfers uint64  `json:"transfers"`
	Seconds   float64 `json:"seconds"`
	Rate      float64 `json:"rate"`
	LatencyMS struct {
		P50 float64 `json:"p50"`
		P99 float64 `json:"p99"`
		Max float64 `json:"max"`
	} `json:"latency_ms"`
	Errors []string `json:"errors"`
}

// probeResult is what `bank probe` prints.
type probeResult struct {
	Probed times `json:"probed"`
	Direct times `json:"direct"`
	err    error
}

type times struct {
	MS  []float64 `json:"first_byte_ms"`
	P50 float64   `json:"p50"`
	Max float64   `json:"max"`
}

// attempt is a plaintext connection from outside the mesh.
type attempt struct {
	target netip.AddrPort
	answer string // what came back
	err    error  // how it ended
}

// outage is what happened while `assay up` was dead.
type outage struct {
	length  time.Duration
	before  map[int]string // proxies by pid, with their start time
	after   map[int]string // once a new `assay up` was ready
	err     error
	started bool // something listened on the agent's socket during it: no outage
}
