package kube

import (
	"encoding/json"
	"fmt"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"assay.dev"
	"assay.dev/discovery"
)

var serviceType = reflect.TypeFor[corev1.Service]()

// service reads a core v1 Service.
func (d *document) service() {
	var in struct {
		Spec corev1.ServiceSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	d.clusterFeatures(&in.Spec)
	d.labels("spec.selector", in.Spec.Selector)
	out, kept := reading{teller: d}.service(d.namespace, &d.meta, &in.Spec)
	d.intent.Services = append(d.intent.Services, out)
	d.keep(kept)
}

// teller takes what is wrong: a document has files and lines for it, an object from
// an API server has notes.
type teller interface {
	at(path, format string, args ...any)
	missing(path, text string)
}

// note says what is not done of what a service says, and breaks nothing.
func (r reading) note(out *discovery.DeclaredService, path, format string, args ...any) {
	out.Notes = append(out.Notes, path+": "+fmt.Sprintf(format, args...))
}

// reading is the one translation of a service, wherever it comes from.
type reading struct {
	teller
	cluster bool // from an API server, which has checked the form and gives addresses
}

func (r reading) service(namespace string, meta *metav1.ObjectMeta, spec *corev1.ServiceSpec) (discovery.DeclaredService, serviceSpec) {
	out := discovery.DeclaredService{Namespace: namespace, Name: meta.Name, Headless: spec.ClusterIP == corev1.ClusterIPNone, Selector: spec.Selector}
	if len(spec.Ports) == 0 {
		r.missing("spec.ports", "a service needs at least one port")
	}
	announce, certify := r.annotation(meta, ProxyProtocol, "v2"), r.annotation(meta, ForwardClientCert, "true")
	var kept serviceSpec
	names, numbers := map[string]int{}, map[int32]int{}
	for i, p := range spec.Ports {
		path := fmt.Sprintf("spec.ports[%d]", i)
		if r.cluster && p.Protocol != "" && p.Protocol != corev1.ProtocolTCP {
			r.note(&out, path+".protocol", "%s passes outside the mesh and is listed as an exception", p.Protocol)
			continue
		}
		if first, twice := names[p.Name]; twice && p.Name != "" {
			r.at(path+".name", "%q is already the name of spec.ports[%d]", p.Name, first)
		}
		if first, twice := numbers[p.Port]; twice && p.Port != 0 {
			r.at(path+".port", "%d is already the port of spec.ports[%d]", p.Port, first)
		}
		names[p.Name], numbers[p.Port] = i, i
		if p.Name == "" && len(spec.Ports) > 1 {
			r.missing(path+".name", "each of several ports needs a name")
		}
		declared, keep := r.servicePort(path, p)
		if name := keep.AppProtocol; name != "" && declared.Protocol == assay.Detect {
			r.note(&out, path+".appProtocol", "%q is not known: whoever speaks first decides, as without it", name)
		}
		if announce && declared.Protocol != assay.Opaque && declared.Protocol != assay.TLS {
			r.missing(path+".appProtocol", "the PROXY protocol needs an appProtocol that is not HTTP, for instance tcp: requests of several clients share a connection there")
		} else {
			declared.ProxyProtocol = announce
		}
		if certify && declared.Protocol != assay.HTTP1 && declared.Protocol != assay.HTTP2 {
			r.missing(path+".appProtocol", "forwarding a client's certificate needs appProtocol http, http2 or grpc: in no other protocol is the field looked for")
		} else {
			declared.ForwardClientCert = certify
		}
		out.Ports = append(out.Ports, declared)
		kept.Ports = append(kept.Ports, keep)
	}
	if len(spec.Selector) == 0 {
		out.Selector = nil
	}
	kept.Selector = out.Selector
	r.traffic(&out, &kept, spec)
	if out.Headless {
		kept.ClusterIP = corev1.ClusterIPNone
	}
	return out, kept
}

// Bounds of an affinity's time, as the API server has them, in seconds.
const (
	defaultAffinity = 10800
	maxAffinity     = 86400
)

// traffic reads which endpoints clients are sent to. Clients of a headless service choose
// themselves, as everywhere.
func (r reading) traffic(out *discovery.DeclaredService, kept *serviceSpec, spec *corev1.ServiceSpec) {
	const chosen = "a headless service's clients choose an endpoint themselves"
	switch a := spec.SessionAffinity; a {
	case "", corev1.ServiceAffinityNone:
	case corev1.ServiceAffinityClientIP:
		seconds := r.affinity(spec.SessionAffinityConfig)
		kept.SessionAffinity, kept.SessionAffinityConfig = a, spec.SessionAffinityConfig
		if out.Headless {
			r.note(out, "spec.sessionAffinity", chosen)
		} else {
			out.Affinity = time.Duration(seconds) * time.Second
		}
	default:
		r.at("spec.sessionAffinity", "%q: want None or ClientIP", a)
	}
	switch p := spec.InternalTrafficPolicy; {
	case p == nil || *p == corev1.ServiceInternalTrafficPolicyCluster:
	case *p == corev1.ServiceInternalTrafficPolicyLocal:
		kept.InternalTrafficPolicy = *p
		if out.Headless {
			r.note(out, "spec.internalTrafficPolicy", chosen)
		} else {
			out.Local = true
		}
	default:
		r.at("spec.internalTrafficPolicy", "%q: want Cluster or Local", *p)
	}
}

// affinity returns the seconds for which a client is remembered.
func (r reading) affinity(c *corev1.SessionAffinityConfig) int32 {
	if c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil {
		return defaultAffinity
	}
	n := *c.ClientIP.TimeoutSeconds
	if n < 1 || n > maxAffinity {
		r.at("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "want 1 to %d", maxAffinity)
		return defaultAffinity
	}
	return n
}

// Annotations of a Service whose applications want to be told who their clients are.
const (
	// ProxyProtocol "v2": with a PROXY protocol header on each connection.
	ProxyProtocol = "assay.dev/proxy-protocol"
	// ForwardClientCert "true": in X-Forwarded-Client-Cert, with each request of HTTP.
	ForwardClientCert = "assay.dev/forward-client-cert"
)

// annotation reports whether the object has it, with the one value that it may have.
func (r reading) annotation(meta *metav1.ObjectMeta, name, value string) bool {
	v, ok := meta.Annotations[name]
	if ok && v != value {
		r.at("metadata.annotations."+name, "%q: want %s", v, value)
	}
	return ok && v == value
}

// serviceSpec is the normal form of a service: what it says, without defaults.
type serviceSpec struct {
	ClusterIP             string                              `json:"clusterIP,omitempty"`
	Selector              map[string]string                   `json:"selector,omitempty"`
	Ports                 []servicePort                       `json:"ports"`
	SessionAffinity       corev1.ServiceAffinity              `json:"sessionAffinity,omitempty"`
	SessionAffinityConfig *corev1.SessionAffinityConfig       `json:"sessionAffinityConfig,omitempty"`
	InternalTrafficPolicy corev1.ServiceInternalTrafficPolicy `json:"internalTrafficPolicy,omitempty"`
}

type servicePort struct {
	Name        string `json:"name,omitempty"`
	Port        int32  `json:"port"`
	TargetPort  int32  `json:"targetPort,omitempty"`
	AppProtocol string `json:"appProtocol,omitempty"`
}

func (r reading) servicePort(path string, p corev1.ServicePort) (discovery.DeclaredPort, servicePort) {
	keep := servicePort{Name: p.Name, Port: p.Port}
	if p.Name != "" && !assay.ValidName(p.Name) {
		r.at(path+".name", "%q may hold a-z, 0-9 and '-', 63 characters at most", p.Name)
	}
	switch p.Protocol {
	case "", corev1.ProtocolTCP:
	case corev1.ProtocolUDP, corev1.ProtocolSCTP:
		r.at(path+".protocol", "%s is not supported standalone: it passes outside the mesh and is listed as an exception; leave the port out", p.Protocol)
	default:
		r.at(path+".protocol", "%q is not a protocol; want TCP", p.Protocol)
	}
	if !validPort(p.Port) {
		r.missing(path+".port", "want a number from 1 to 65535")
	}
	switch target := p.TargetPort; {
	case target.Type == intstr.String && r.cluster: // each endpoint has its own
	case target.Type == intstr.String:
		r.at(path+".targetPort", "the name %q cannot be resolved standalone, where no container declares ports; write its number", target.StrVal)
	case target.IntVal != 0 && !validPort(target.IntVal):
		r.at(path+".targetPort", "want a number from 1 to 65535")
	case target.IntVal != p.Port:
		keep.TargetPort = target.IntVal
	}
	if p.NodePort != 0 && !r.cluster {
		r.at(path+".nodePort", "not supported standalone: a service is reached at its name, on hosts of the mesh only")
	}
	protocol := assay.Detect
	if p.AppProtocol != nil {
		var err error
		if protocol, err = Protocol(*p.AppProtocol); err != nil {
			r.at(path+".appProtocol", "%v", err)
		}
		keep.AppProtocol = *p.AppProtocol
	}
	return discovery.DeclaredPort{
		Port:   assay.Port{Name: p.Name, Port: uint16(p.Port), Protocol: protocol, NodePort: uint16(p.NodePort)},
		Target: uint16(keep.TargetPort),
	}, keep
}

func validPort(p int32) bool { return p >= 1 && p <= 65535 }

// clusterFeatures refuses what only a cluster can do. Doing without it silently
// would be a promise broken.
func (d *document) clusterFeatures(s *corev1.ServiceSpec) {
	const only = "not supported standalone: "
	for _, f := range []struct {
		field string
		used  bool
		text  string
	}{
		{"type", s.Type != "" && s.Type != corev1.ServiceTypeClusterIP, "type " + string(s.Type) + " needs a cluster; want ClusterIP"},
		{"clusterIP", s.ClusterIP != "" && s.ClusterIP != corev1.ClusterIPNone, "the mesh gives stable virtual addresses itself; remove it, or write None for a headless service"},
		{"clusterIPs", len(s.ClusterIPs) > 0 && !(len(s.ClusterIPs) == 1 && s.ClusterIPs[0] == corev1.ClusterIPNone && s.ClusterIP == corev1.ClusterIPNone), "the mesh gives stable virtual addresses itself; remove it"},
		{"externalName", s.ExternalName != "", "what is outside the mesh is reached by its own name"},
		{"externalIPs", len(s.ExternalIPs) > 0, "a service is reached at its name, on hosts of the mesh only"},
		{"externalTrafficPolicy", s.ExternalTrafficPolicy != "", "a service has no address outside the mesh"},
		{"healthCheckNodePort", s.HealthCheckNodePort != 0, "a service has no port outside the mesh"},
		{"loadBalancerIP", s.LoadBalancerIP != "", "there is no load balancer"},
		{"loadBalancerClass", s.LoadBalancerClass != nil, "there is no load balancer"},
		{"loadBalancerSourceRanges", len(s.LoadBalancerSourceRanges) > 0, "there is no load balancer"},
		{"allocateLoadBalancerNodePorts", s.AllocateLoadBalancerNodePorts != nil, "there is no load balancer"},
		{"publishNotReadyAddresses", s.PublishNotReadyAddresses, "an endpoint is ready when the kernel shows that its port listens"},
		{"trafficDistribution", s.TrafficDistribution != nil, "endpoints in the client's zone are preferred anyway; see locality of a TrafficPolicy"},
		{"ipFamilyPolicy", s.IPFamilyPolicy != nil && *s.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack, "a service has an IPv4 and an IPv6 address; remove it"},
		{"ipFamilies", len(s.IPFamilies) == 1, "a service has an IPv4 and an IPv6 address; remove it"},
	} {
		if f.used {
			d.at("spec."+f.field, "%s", only+f.text)
		}
	}
}
