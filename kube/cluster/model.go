package cluster

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"assay.dev/discovery"
	"assay.dev/kube"
)

// model holds the objects and computes what they mean. Each change marks what it
// touches; changes computes those alone. It is not safe for concurrent use.
type model struct {
	services map[string]*corev1.Service                       // by key
	slices   map[string]map[string]*discoveryv1.EndpointSlice // by the service's key, by name
	owner    map[string]string                                // a slice's key -> its service's
	pods     map[string]*Pod                                  // by UID
	nodes    map[string]Node                                  // by name
	mesh     map[string]string                                // what namespaces say of the mesh, where they are watched
	injects  string                                           // repository of the image that is put into pods; "" for none
	inSlices map[string]map[string]int                        // pod UID -> keys of services, with how many slices say so

	configured map[string]*configured // by configurationKey
	missing    []string               // kinds of configuration

	out         map[string]Service
	outPods     map[string]Pod
	outNodes    map[string]Node
	touched     map[string]bool // keys of services
	touchedPods map[string]bool // UIDs
	// Nodes come and go rarely, and their objects change all the time.
	touchedNodes bool
	// Configuration is put together as a whole: it changes when people do something.
	touchedConfiguration bool
}

func newModel() *model {
	return &model{
		services: map[string]*corev1.Service{}, slices: map[string]map[string]*discoveryv1.EndpointSlice{}, owner: map[string]string{},
		pods: map[string]*Pod{}, nodes: map[string]Node{}, mesh: map[string]string{}, inSlices: map[string]map[string]int{}, configured: map[string]*configured{},
		out: map[string]Service{}, outPods: map[string]Pod{}, outNodes: map[string]Node{}, touched: map[string]bool{}, touchedPods: map[string]bool{},
		touchedConfiguration: true, // that there is none is worth telling once
	}
}

func (m *model) setService(s *corev1.Service) {
	key := s.Namespace + "/" + s.Name
	m.services[key] = s
	m.touched[key] = true
}

func (m *model) removeService(namespace, name string) {
	key := namespace + "/" + name
	delete(m.services, key)
	m.touched[key] = true
}

// setSlice adds or replaces a slice; it may have come to belong to another service.
func (m *model) setSlice(s *discoveryv1.EndpointSlice) {
	m.removeSlice(s.Namespace, s.Name)
	service := s.Labels[discoveryv1.LabelServiceName]
	if service == "" || s.AddressType == discoveryv1.AddressTypeFQDN {
		return
	}
	key := s.Namespace + "/" + service
	if m.slices[key] == nil {
		m.slices[key] = map[string]*discoveryv1.EndpointSlice{}
	}
	m.slices[key][s.Name] = s
	m.owner[s.Namespace+"/"+s.Name] = key
	m.count(s, key, 1)
	m.touched[key] = true
}

func (m *model) removeSlice(namespace, name string) {
	key, ok := m.owner[namespace+"/"+name]
	if !ok {
		return
	}
	m.count(m.slices[key][name], key, -1)
	delete(m.owner, namespace+"/"+name)
	if delete(m.slices[key], name); len(m.slices[key]) == 0 {
		delete(m.slices, key)
	}
	m.touched[key] = true
}

// count keeps which services a pod is in.
func (m *model) count(s *discoveryv1.EndpointSlice, key string, by int) {
	for i := range s.Endpoints {
		uid := podOf(&s.Endpoints[i])
		if uid == "" {
			continue
		}
		if m.inSlices[uid] == nil {
			m.inSlices[uid] = map[string]int{}
		}
		if m.inSlices[uid][key] += by; m.inSlices[uid][key] == 0 {
			delete(m.inSlices[uid], key)
		}
		if len(m.inSlices[uid]) == 0 {
			delete(m.inSlices, uid)
		}
	}
}

func podOf(e *discoveryv1.Endpoint) string {
	if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
		return string(e.TargetRef.UID)
	}
	return ""
}

// setPod adds or replaces a pod; one that has ended or has no node is none.
func (m *model) setPod(p *corev1.Pod) {
	uid := string(p.UID)
	pod := m.translatePod(p)
	if pod == nil {
		m.removePod(uid)
		return
	}
	m.asks(pod)
	m.pods[uid] = pod
	m.touchPod(uid)
}

func (m *model) removePod(uid string) {
	if _, ok := m.pods[uid]; ok {
		delete(m.pods, uid)
		m.touchPod(uid)
	}
}

func (m *model) setNode(n *corev1.Node) {
	now := Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone], Agentless: kube.Agentless(n.Labels)}
	for _, a := range n.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); a.Type == corev1.NodeInternalIP && err == nil {
			now.Addrs = append(now.Addrs, addr.Unmap())
		}
	}
	slices.SortFunc(now.Addrs, compareAddrs)
	if old, known := m.nodes[n.Name]; !known || !reflect.DeepEqual(old, now) {
		m.nodes[n.Name], m.touchedNodes = now, true
	}
}

func (m *model) removeNode(name string) {
	if _, known := m.nodes[name]; known {
		delete(m.nodes, name)
		m.touchedNodes = true
	}
}

// The five that follow remove what is not in a whole new list: while the API server was
// away, objects may have gone without a word, and others may have come by their names.

func (m *model) retainServices(list []any) {
	there := map[string]bool{}
	for _, o := range list {
		s := o.(*corev1.Service)
		there[s.Namespace+"/"+s.Name] = true
	}
	for key, s := range m.services {
		if !there[key] {
			m.removeService(s.Namespace, s.Name)
		}
	}
}

func (m *model) retainSlices(list []any) {
	there := map[string]bool{}
	for _, o := range list {
		s := o.(*discoveryv1.EndpointSlice)
		there[s.Namespace+"/"+s.Name] = true
	}
	for key := range m.owner {
		if namespace, name, _ := strings.Cut(key, "/"); !there[key] {
			m.removeSlice(namespace, name)
		}
	}
}

func (m *model) retainPods(list []any) {
	there := map[string]bool{}
	for _, o := range list {
		there[string(o.(*corev1.Pod).UID)] = true
	}
	for uid := range m.pods {
		if !there[uid] {
			m.removePod(uid)
		}
	}
}

func (m *model) retainNodes(list []any) {
	there := map[string]bool{}
	for _, o := range list {
		there[o.(*corev1.Node).Name] = true
	}
	for name := range m.nodes {
		if !there[name] {
			m.removeNode(name)
		}
	}
}

func (m *model) retainNamespaces(list []any) {
	there := map[string]bool{}
	for _, o := range list {
		there[o.(*metav1.PartialObjectMetadata).Name] = true
	}
	for name := range m.mesh {
		if !there[name] {
			m.removeNamespace(name)
		}
	}
}

func (m *model) touchPod(uid string) {
	m.touchedPods[uid] = true
	for key := range m.inSlices[uid] {
		m.touched[key] = true
	}
}

func (m *model) translatePod(p *corev1.Pod) *Pod {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed || p.Spec.NodeName == "" {
		return nil
	}
	out := &Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Account: cmp.Or(p.Spec.ServiceAccountName, "default"),
		Node: p.Spec.NodeName, Labels: p.Labels, HostNetwork: p.Spec.HostNetwork, Terminating: p.DeletionTimestamp != nil,
	}
	if out.Sidecar = sidecarOf(p); out.Sidecar != "" {
		out.Artifacts = m.artifacts(p)
	}
	for _, ip := range p.Status.PodIPs {
		if addr, err := netip.ParseAddr(ip.IP); err == nil {
			out.Addrs = append(out.Addrs, addr.Unmap())
		}
	}
	slices.SortFunc(out.Addrs, compareAddrs)
	for _, c := range p.Status.Conditions {
		out.Ready = out.Ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}
	return out
}

// compareAddrs puts IPv4 first.
func compareAddrs(a, b netip.Addr) int {
	return cmp.Or(cmp.Compare(a.BitLen(), b.BitLen()), a.Compare(b))
}

// changes computes what was touched.
func (m *model) changes() Changes {
	var c Changes
	for _, key := range slices.Sorted(maps.Keys(m.touched)) {
		old, had := m.out[key]
		s, exists := m.service(key)
		switch {
		case !exists && had:
			delete(m.out, key)
			c.RemovedServices = append(c.RemovedServices, key)
		case exists && (!had || !reflect.DeepEqual(old, s)):
			m.out[key] = s
			c.Services = append(c.Services, s)
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(m.touchedPods)) {
		old, had := m.outPods[uid]
		p := m.pods[uid]
		switch {
		case p == nil && had:
			delete(m.outPods, uid)
			c.RemovedPods = append(c.RemovedPods, uid)
		case p != nil && (!had || !reflect.DeepEqual(old, *p)):
			m.outPods[uid] = *p
			c.Pods = append(c.Pods, *p)
		}
	}
	if m.touchedNodes {
		for _, name := range slices.Sorted(maps.Keys(m.nodes)) {
			if old, told := m.outNodes[name]; !told || !reflect.DeepEqual(old, m.nodes[name]) {
				c.Nodes = append(c.Nodes, m.nodes[name])
			}
		}
		for _, name := range slices.Sorted(maps.Keys(m.outNodes)) {
			if _, there := m.nodes[name]; !there {
				c.RemovedNodes = append(c.RemovedNodes, name)
			}
		}
		m.outNodes, m.touchedNodes = maps.Clone(m.nodes), false
	}
	if m.touchedConfiguration {
		c.Configuration = m.configuration()
		m.touchedConfiguration = false
	}
	clear(m.touched)
	clear(m.touchedPods)
	return c
}

// service computes one service; false when there is none of that key that the mesh
// has to do with.
func (m *model) service(key string) (Service, bool) {
	object := m.services[key]
	if object == nil {
		return Service{}, false
	}
	declared, ok := kube.Service(object)
	s := Service{DeclaredService: declared}
	if object.Spec.Type == corev1.ServiceTypeExternalName {
		s.ExternalName = strings.TrimSuffix(object.Spec.ExternalName, ".")
		s.Ports, s.Notes = nil, []string{"spec.externalName: connections go to whatever " + s.ExternalName + " is: what is outside of the mesh is egress"}
		return s, s.ExternalName != ""
	}
	if !ok {
		return Service{}, false
	}
	s.Places = m.places(key, &s)
	return s, true
}

// places merges what the slices of a service say. A pod is one place, though it is in
// one slice for each family, and for a moment in two of one while slices are rearranged:
// then it is as ready as the readier says.
func (m *model) places(key string, s *Service) []discovery.Place {
	merged := map[string]*discovery.Place{}
	for _, name := range slices.Sorted(maps.Keys(m.slices[key])) {
		slice := m.slices[key][name]
		targets := targetsOf(slice, s)
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			addr, pod, ok := m.locate(e)
			if !ok {
				continue
			}
			id := cmp.Or(pod, addr.String())
			p := merged[id]
			if p == nil {
				p = &discovery.Place{Workload: pod, Targets: make([]uint16, len(s.Ports))}
				merged[id] = p
			}
			extend(p, e, addr, targets)
			if s.Local {
				p.Host = cmp.Or(p.Host, deref(e.NodeName))
			}
		}
	}
	var out []discovery.Place
	for _, id := range slices.Sorted(maps.Keys(merged)) {
		p := merged[id]
		slices.SortFunc(p.Addrs, compareAddrs)
		out = append(out, *p)
	}
	return out
}

// locate returns an endpoint's address and pod. One that names a pod is believed where
// the pod is known and has the address: a slice is what somebody has written.
func (m *model) locate(e *discoveryv1.Endpoint) (addr netip.Addr, pod string, ok bool) {
	if len(e.Addresses) == 0 {
		return addr, "", false
	}
	addr, err := netip.ParseAddr(e.Addresses[0]) // the others have no meaning (EndpointSlice, v1)
	if err != nil {
		return addr, "", false
	}
	addr = addr.Unmap()
	if pod = podOf(e); pod == "" {
		return addr, "", true
	}
	p := m.pods[pod]
	return addr, pod, p != nil && slices.Contains(p.Addrs, addr)
}

// targetsOf finds the slice's port for each of the service's, by name.
func targetsOf(slice *discoveryv1.EndpointSlice, s *Service) []uint16 {
	targets := make([]uint16, len(s.Ports))
	for i, port := range s.Ports {
		for _, p := range slice.Ports {
			tcp := p.Protocol == nil || *p.Protocol == corev1.ProtocolTCP
			if tcp && deref(p.Name) == port.Name && p.Port != nil && *p.Port >= 1 && *p.Port <= 65535 {
				targets[i] = uint16(*p.Port)
			}
		}
	}
	return targets
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// extend takes in what one slice says of a place.
func extend(p *discovery.Place, e *discoveryv1.Endpoint, addr netip.Addr, targets []uint16) {
	same := slices.ContainsFunc(p.Addrs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() })
	if !same {
		p.Addrs = append(p.Addrs, addr)
	}
	for i, t := range targets {
		if p.Targets[i] == 0 {
			p.Targets[i] = t
		}
	}
	ready := e.Conditions.Ready == nil || *e.Conditions.Ready // unknown is ready (EndpointConditions, v1)
	p.Ready = p.Ready || ready
	if e.Conditions.Serving == nil {
		p.Serving = p.Serving || ready
	} else {
		p.Serving = p.Serving || *e.Conditions.Serving
	}
	p.Terminating = p.Terminating || deref(e.Conditions.Terminating)
	p.Zone = cmp.Or(p.Zone, deref(e.Zone))
	if e.Hints != nil && p.Zones == nil && p.Hosts == nil {
		for _, z := range e.Hints.ForZones {
			p.Zones = append(p.Zones, z.Name)
		}
		slices.Sort(p.Zones)
		for _, n := range e.Hints.ForNodes {
			p.Hosts = append(p.Hosts, n.Name)
		}
		slices.Sort(p.Hosts)
	}
}
