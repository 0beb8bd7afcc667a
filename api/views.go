package api

import (
	"encoding/json"
	"time"

	"assay.dev"
)

// The documents of Operator.List, one type per kind: stable, fields are only ever
// added. docs/json.md describes them for people. Kinds that are missing here are
// nouns or records as they are: edges (assay.Edge), findings (store.Finding), audit
// (store.Audit), tokens (store.Token).

// ServiceView is of kind "services".
type ServiceView struct {
	assay.Service
	Declared bool `json:"declared"` // somebody wrote it down; else it follows from running workloads
	// Ready counts, for each port in order, the endpoints that take connections.
	Ready []int `json:"ready"`
	// Notes is what the mesh does not do of what the service says, and what it means here.
	Notes []string `json:"notes,omitempty"`
	// ExternalName is the name outside of the mesh that this one stands for; such a service has
	// nothing else.
	ExternalName string `json:"externalName,omitempty"`
}

// WorkloadView is of kind "workloads".
type WorkloadView struct {
	assay.Workload
	Ready    bool   `json:"ready"`              // its proxy accepts and its host is connected
	NotReady string `json:"notReady,omitempty"` // why not
	// ArtifactSet is the digest of its set; Unproven is why that proves nothing.
	ArtifactSet assay.Digest `json:"artifactSet,omitempty"`
	Unproven    string       `json:"unproven,omitempty"`
	Serial      string       `json:"serial,omitempty"` // of its newest certificate
	NotAfter    time.Time    `json:"notAfter,omitzero"`
	Bundle      uint64       `json:"bundle"` // version that its proxy trusts
}

// NamespaceView is of kind "namespaces".
type NamespaceView struct {
	assay.NamespaceConfig
	Declared  bool `json:"declared"` // by a MeshConfig
	Workloads int  `json:"workloads"`
	Services  int  `json:"services"`
}

// ObjectView is of kinds "meshconfigs", "httproutes", "grpcroutes", "tlsroutes" and "referencegrants":
// an object of intent as it was declared.
type ObjectView struct {
	Kind       string          `json:"kind"`
	Namespace  string          `json:"namespace"`
	Name       string          `json:"name"`
	Source     string          `json:"source"` // "apply", "folder" or "cluster"
	Generation int64           `json:"generation"`
	Created    time.Time       `json:"created"`
	Changed    time.Time       `json:"changed"`
	Manifest   json.RawMessage `json:"manifest"` // the object as it can be applied again
	Status     ObjectStatus    `json:"status"`
}

// ObjectStatus is what became of an object.
type ObjectStatus struct {
	InEffect bool   `json:"inEffect"`
	Problem  string `json:"problem,omitempty"`
	// Parents is of a route: its conditions at each parent, as the Gateway API has them.
	Parents []assay.RouteParentStatus `json:"parents,omitempty"`
}

// HostView is of kind "hosts".
type HostView struct {
	assay.Host
	Local     bool      `json:"local"` // in control's own process
	Joined    time.Time `json:"joined"`
	Seen      time.Time `json:"seen"` // when its stream last came or went
	Lost      bool      `json:"lost"` // away for longer than its lease: nothing on it is ready
	Workloads int       `json:"workloads"`
	Bundle    uint64    `json:"bundle"`            // version that its agent trusts
	NotAfter  time.Time `json:"notAfter,omitzero"` // of its certificate; none when local
}

// CertificateView is of kind "certificates".
type CertificateView struct {
	Use       string       `json:"use"`                // root, intermediate, workload, host, operator, viewer
	ID        string       `json:"id,omitempty"`       // of a root or intermediate
	Subject   string       `json:"subject"`            // SPIFFE ID
	Serial    string       `json:"serial"`             // hexadecimal
	Issuer    string       `json:"issuer,omitempty"`   // serial of the issuing certificate
	Phase     string       `json:"phase,omitempty"`    // of a root: published, signing, retiring
	SHA256    assay.Digest `json:"sha256,omitempty"`   // of a root or intermediate
	Current   bool         `json:"current"`            // the newest of its holder
	Workload  string       `json:"workload,omitempty"` // its ID
	Host      string       `json:"host,omitempty"`
	Artifacts assay.Digest `json:"artifacts,omitempty"` // of the set that the leaf names
	NotBefore time.Time    `json:"notBefore"`
	NotAfter  time.Time    `json:"notAfter"`
	IssuedAt  time.Time    `json:"issuedAt,omitzero"`
	Bundle    uint64       `json:"bundle,omitempty"` // version that its holder trusts
}

// SignalsView is of kind "signals": the latest numbers of one workload.
type SignalsView struct {
	Workload  string          `json:"workload"`
	Namespace string          `json:"namespace"`
	Name      string          `json:"name"`
	Service   string          `json:"service,omitempty"`
	Host      string          `json:"host"`
	Identity  assay.Identity  `json:"identity"`
	Started   time.Time       `json:"started"`          // its proxy
	Received  time.Time       `json:"received"`         // the numbers
	Counted   time.Time       `json:"counted,omitzero"` // the numbers, by the clock of their host
	Gone      time.Time       `json:"gone,omitzero"`
	Signals   []assay.Signals `json:"signals"`
	Counters  assay.Counters  `json:"counters"`
	Balance   *assay.Balance  `json:"balance,omitempty"` // of its link; none where the host keeps none
}

// BundleView is of kind "bundle"; there is one.
type BundleView struct {
	Version     uint64     `json:"version"`
	TrustDomain string     `json:"trustDomain"`
	Roots       []RootView `json:"roots"`
	// Behind are proxies and agents that have not acknowledged this version.
	Behind   []BehindView `json:"behind"`
	Deadline time.Time    `json:"deadline,omitzero"` // when a published root signs at the latest
}

// RootView is one root in the bundle.
type RootView struct {
	ID        string       `json:"id"`
	Phase     string       `json:"phase"`
	SHA256    assay.Digest `json:"sha256"`
	NotBefore time.Time    `json:"notBefore"`
	NotAfter  time.Time    `json:"notAfter"`
	PEM       string       `json:"pem"`
}

// BehindView is one that has an older bundle.
type BehindView struct {
	Workload string `json:"workload,omitempty"` // empty: the host's agent
	Host     string `json:"host"`
	Version  uint64 `json:"version"` // 0: none acknowledged since control started
}
