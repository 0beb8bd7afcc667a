package assay

import (
	"net/netip"
	"time"
)

// Mode is how a namespace treats connections that are not under mutual TLS.
type Mode string

const (
	// Observe serves plaintext from outside the mesh, counts it and lists it as
	// an exception.
	Observe Mode = "observe"
	// Strict refuses it.
	Strict Mode = "strict"
)

// Workload is one running instance: one network namespace, one identity, one
// proxy. Its record in a snapshot is what makes its addresses "meshed".
type Workload struct {
	ID        string            `json:"id"` // unique for the life of the mesh
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`              // the account; standalone, the service's name
	Service   string            `json:"service,omitempty"` // the service that `assay run` named
	Host      string            `json:"host"`
	Zone      string            `json:"zone,omitempty"` // of the host: what fails together, and is near
	Identity  Identity          `json:"identity"`
	Addrs     []netip.Addr      `json:"addrs"` // IPv4 first, then IPv6
	Labels    map[string]string `json:"labels,omitempty"`
	Ports     []uint16          `json:"ports,omitempty"`     // declared with --port
	Listening []uint16          `json:"listening,omitempty"` // TCP ports that the kernel shows as listening
	Artifacts ArtifactSet       `json:"artifacts,omitempty"`
	// MeshedSince is when the proxy began to accept; the zero time means that
	// the addresses are known but may not be dialled yet.
	MeshedSince time.Time `json:"meshedSince,omitzero"`
	// Draining workloads finish what they have and get nothing new.
	Draining bool `json:"draining,omitempty"`
}

// Host is one machine with an agent.
type Host struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Advertise netip.Addr `json:"advertise,omitzero"` // where other hosts route this host's prefixes to
	// Advertise6 is the same for its IPv6 workloads where Advertise is IPv4: a packet
	// of one family cannot be routed by a next hop of the other.
	Advertise6 netip.Addr     `json:"advertise6,omitzero"`
	Prefixes   []netip.Prefix `json:"prefixes"` // its workloads' addresses: one IPv4, one IPv6
	// Covers is what its join token allows: "NAMESPACE/SERVICE" patterns, in which
	// '*' stands for any one name.
	Covers []string `json:"covers"`
	Ready  bool     `json:"ready"` // its stream to control is up
	// Zone is what its node's platform says that it fails together with; "" where none does.
	Zone string `json:"zone,omitempty"`
	// Addrs are its node's own, as its platform has them; none where there is none.
	Addrs []netip.Addr `json:"addrs,omitempty"`
}

// NamespaceConfig is the effective MeshConfig of one namespace.
type NamespaceConfig struct {
	Namespace     string   `json:"namespace"`
	Mode          Mode     `json:"mode"`
	ExcludedPorts []uint16 `json:"excludedPorts,omitempty"` // pass untouched
	AccessLog     int      `json:"accessLog,omitempty"`     // share of requests in the hosts' access logs, parts per million
	Traces        bool     `json:"traces,omitempty"`        // requests that a trace context samples make spans
	// Egress is how connections to outside the mesh are treated: Observe (the zero value
	// too) lets them pass and lists them; Strict refuses what no rule allows.
	Egress Mode         `json:"egress,omitempty"`
	Allow  []EgressRule `json:"allow,omitempty"` // in the order of their names
}
