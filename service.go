package assay

import (
	"net/netip"
	"reflect"
	"slices"
	"time"
)

// Protocol is what is spoken on a connection, as declared or detected.
type Protocol string

const (
	Detect Protocol = ""       // not declared: whoever speaks first decides
	HTTP1  Protocol = "http1"  // RFC 9112
	HTTP2  Protocol = "http2"  // RFC 9113 with prior knowledge; gRPC too
	TLS    Protocol = "tls"    // the application's own TLS
	Opaque Protocol = "opaque" // bytes
)

// What passes beside the proxy is not TCP, or nobody looked into it.
const (
	UDP     Protocol = "udp"
	UDPLite Protocol = "udp-lite"
	SCTP    Protocol = "sctp"
	DCCP    Protocol = "dccp"
	ICMP    Protocol = "icmp"
	OtherIP Protocol = "ip" // any other protocol over IP
)

// Service is a name with addresses of its own and endpoints behind it.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// VIPs are stable virtual addresses, IPv4 first; none when headless.
	VIPs     []netip.Addr `json:"vips,omitempty"`
	Headless bool         `json:"headless,omitempty"`
	// Externals are addresses outside of the mesh's networks at which it is reached from within
	// all the same: those of its load balancer. They stand behind whoever of the mesh has one.
	Externals []netip.Addr `json:"externals,omitempty"`
	Ports     []Port       `json:"ports"`
	Endpoints []Endpoint   `json:"endpoints,omitempty"`
	// Affinity keeps each client at one endpoint, until that is not ready or for so long
	// after it used it last; 0: any.
	Affinity time.Duration `json:"affinity,omitempty"`
	// Local has clients sent to endpoints of their own host alone.
	Local bool `json:"local,omitempty"`
	// Policy is in effect for its clients and its workloads; nil for the defaults.
	Policy *TrafficPolicy `json:"policy,omitempty"`
}

// Key returns "NAMESPACE/NAME".
func (s *Service) Key() string { return s.Namespace + "/" + s.Name }

// EqualBut reports whether two services say the same but for their endpoints.
func (s *Service) EqualBut(o *Service) bool {
	return s.Namespace == o.Namespace && s.Name == o.Name && s.Headless == o.Headless && s.Affinity == o.Affinity && s.Local == o.Local &&
		slices.Equal(s.VIPs, o.VIPs) && slices.Equal(s.Externals, o.Externals) && slices.Equal(s.Ports, o.Ports) &&
		reflect.DeepEqual(s.Policy, o.Policy)
}

// ReadyAt reports whether clients on a host, by its ID, may be sent to the i-th port of e.
func (s *Service) ReadyAt(e *Endpoint, i int, host string) bool {
	return i < len(e.Targets) && e.Targets[i] != 0 && len(e.Addrs) > 0 && (!s.Local || e.Host == host)
}

// Port is one port of a service.
type Port struct {
	Name     string   `json:"name,omitempty"`
	Port     uint16   `json:"port"`
	Protocol Protocol `json:"protocol,omitempty"` // from appProtocol; wins over detection
	// NodePort is the port at the addresses of every node of a platform that is this one for its
	// clients, too; 0 for none.
	NodePort uint16 `json:"nodePort,omitempty"`
	// ProxyProtocol begins each connection to the application with a PROXY protocol
	// header of version 2, which names the client. Never with a protocol of HTTP.
	ProxyProtocol bool `json:"proxyProtocol,omitempty"`
	// ForwardClientCert tells applications of their client's certificate in the field
	// X-Forwarded-Client-Cert, and takes away what a client says there. With HTTP/1 and HTTP/2 only.
	ForwardClientCert bool `json:"forwardClientCert,omitempty"`
}

// Endpoint is where connections to a service may go: a workload of the mesh, or, with
// the zero Identity, something that is not meshed. That one is dialled in plaintext, and
// never if the address table has a workload at its address.
type Endpoint struct {
	Workload string       `json:"workload,omitempty"` // Workload.ID; "" for an address that nobody runs whom we know
	Identity Identity     `json:"identity"`           // what its certificate must say
	Addrs    []netip.Addr `json:"addrs"`
	// Targets holds, for each of the service's ports in order, the workload's
	// port, or 0 while it is not ready there.
	Targets []uint16 `json:"targets"`
	Zone    string   `json:"zone,omitempty"` // of its host
	// Zones are those for whose clients it is meant, where it counts (topology hints); nil
	// for all. Hosts are the same by the IDs of hosts, and count before zones do.
	Zones []string `json:"zones,omitempty"`
	Hosts []string `json:"hosts,omitempty"`
	// Host is the ID of the one that it is on, where that matters: of a service that is Local.
	Host string `json:"host,omitempty"`
}

// Equal reports whether two endpoints say the same.
func (e *Endpoint) Equal(o *Endpoint) bool {
	return e.Workload == o.Workload && e.Identity == o.Identity && slices.Equal(e.Addrs, o.Addrs) && slices.Equal(e.Targets, o.Targets) &&
		e.Zone == o.Zone && slices.Equal(e.Zones, o.Zones) && e.Host == o.Host && slices.Equal(e.Hosts, o.Hosts)
}
