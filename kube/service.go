package kube

import (
	"encoding/json"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
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

	out := discovery.DeclaredService{Namespace: d.namespace, Name: d.meta.Name, Headless: in.Spec.ClusterIP == corev1.ClusterIPNone, Selector: in.Spec.Selector}
	if len(in.Spec.Ports) == 0 {
		d.missing("spec.ports", "a service needs at least one port")
	}
	announce, certify := d.annotation(ProxyProtocol, "v2"), d.annotation(ForwardClientCert, "true")
	var kept serviceSpec
	names, numbers := map[string]int{}, map[int32]int{}
	for i, p := range in.Spec.Ports {
		path := fmt.Sprintf("spec.ports[%d]", i)
		if first, twice := names[p.Name]; twice && p.Name != "" {
			d.at(path+".name", "%q is already the name of spec.ports[%d]", p.Name, first)
		}
		if first, twice := numbers[p.Port]; twice && p.Port != 0 {
			d.at(path+".port", "%d is already the port of spec.ports[%d]", p.Port, first)
		}
		names[p.Name], numbers[p.Port] = i, i
		if p.Name == "" && len(in.Spec.Ports) > 1 {
			d.missing(path+".name", "each of several ports needs a name")
		}
		declared, keep := d.servicePort(path, p)
		if declared.ProxyProtocol = announce; announce && declared.Protocol != assay.Opaque && declared.Protocol != assay.TLS {
			d.missing(path+".appProtocol", "the PROXY protocol needs an appProtocol that is not HTTP, for instance tcp: requests of several clients share a connection there")
		}
		if declared.ForwardClientCert = certify; certify && declared.Protocol != assay.HTTP1 && declared.Protocol != assay.HTTP2 {
			d.missing(path+".appProtocol", "forwarding a client's certificate needs appProtocol http, http2 or grpc: in no other protocol is the field looked for")
		}
		out.Ports = append(out.Ports, declared)
		kept.Ports = append(kept.Ports, keep)
	}
	if len(in.Spec.Selector) == 0 {
		out.Selector = nil
	}
	kept.Selector = out.Selector
	if out.Headless {
		kept.ClusterIP = corev1.ClusterIPNone
	}
	d.intent.Services = append(d.intent.Services, out)
	d.keep(kept)
}

// Annotations of a Service whose applications want to be told who their clients are.
const (
	// ProxyProtocol "v2": with a PROXY protocol header on each connection.
	ProxyProtocol = "assay.dev/proxy-protocol"
	// ForwardClientCert "true": in X-Forwarded-Client-Cert, with each request of HTTP.
	ForwardClientCert = "assay.dev/forward-client-cert"
)

// annotation reports whether the object has it, with the one value that it may have.
func (d *document) annotation(name, value string) bool {
	v, ok := d.meta.Annotations[name]
	if ok && v != value {
		d.at("metadata.annotations."+name, "%q: want %s", v, value)
	}
	return ok && v == value
}

// serviceSpec is the normal form of a service: what it says, without defaults.
type serviceSpec struct {
	ClusterIP string            `json:"clusterIP,omitempty"`
	Selector  map[string]string `json:"selector,omitempty"`
	Ports     []servicePort     `json:"ports"`
}

type servicePort struct {
	Name        string `json:"name,omitempty"`
	Port        int32  `json:"port"`
	TargetPort  int32  `json:"targetPort,omitempty"`
	AppProtocol string `json:"appProtocol,omitempty"`
}

func (d *document) servicePort(path string, p corev1.ServicePort) (discovery.DeclaredPort, servicePort) {
	keep := servicePort{Name: p.Name, Port: p.Port}
	if p.Name != "" && !assay.ValidName(p.Name) {
		d.at(path+".name", "%q may hold a-z, 0-9 and '-', 63 characters at most", p.Name)
	}
	switch p.Protocol {
	case "", corev1.ProtocolTCP:
	case corev1.ProtocolUDP, corev1.ProtocolSCTP:
		d.at(path+".protocol", "%s is not supported standalone: it passes outside the mesh and is listed as an exception; leave the port out", p.Protocol)
	default:
		d.at(path+".protocol", "%q is not a protocol; want TCP", p.Protocol)
	}
	if !validPort(p.Port) {
		d.missing(path+".port", "want a number from 1 to 65535")
	}
	switch target := p.TargetPort; {
	case target.Type == intstr.String:
		d.at(path+".targetPort", "the name %q cannot be resolved standalone, where no container declares ports; write its number", target.StrVal)
	case target.IntVal != 0 && !validPort(target.IntVal):
		d.at(path+".targetPort", "want a number from 1 to 65535")
	case target.IntVal != p.Port:
		keep.TargetPort = target.IntVal
	}
	if p.NodePort != 0 {
		d.at(path+".nodePort", "not supported standalone: a service is reached at its name, on hosts of the mesh only")
	}
	protocol := assay.Detect
	if p.AppProtocol != nil {
		var err error
		if protocol, err = Protocol(*p.AppProtocol); err != nil {
			d.at(path+".appProtocol", "%v", err)
		}
		keep.AppProtocol = *p.AppProtocol
	}
	return discovery.DeclaredPort{
		Port:   assay.Port{Name: p.Name, Port: uint16(p.Port), Protocol: protocol},
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
		{"sessionAffinity", s.SessionAffinity != "" && s.SessionAffinity != corev1.ServiceAffinityNone, "requests go to the endpoint that is quickest; want None"},
		{"sessionAffinityConfig", s.SessionAffinityConfig != nil, "requests go to the endpoint that is quickest"},
		{"publishNotReadyAddresses", s.PublishNotReadyAddresses, "an endpoint is ready when the kernel shows that its port listens"},
		{"internalTrafficPolicy", s.InternalTrafficPolicy != nil && *s.InternalTrafficPolicy != corev1.ServiceInternalTrafficPolicyCluster, "all hosts of the mesh are one cluster; want Cluster"},
		{"trafficDistribution", s.TrafficDistribution != nil, "hosts have no zones"},
		{"ipFamilyPolicy", s.IPFamilyPolicy != nil && *s.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack, "a service has an IPv4 and an IPv6 address; remove it"},
		{"ipFamilies", len(s.IPFamilies) == 1, "a service has an IPv4 and an IPv6 address; remove it"},
	} {
		if f.used {
			d.at("spec."+f.field, "%s", only+f.text)
		}
	}
}
