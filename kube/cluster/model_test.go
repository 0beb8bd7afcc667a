package cluster

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube"
)

// read reads objects of the API as it has them.
func read(t *testing.T, manifests string) []any {
	t.Helper()
	var list []any
	for _, text := range strings.Split(manifests, "---\n") {
		var kind struct{ Kind string }
		if err := yaml.Unmarshal([]byte(text), &kind); err != nil {
			t.Fatal(err)
		}
		var object any
		switch kind.Kind {
		case "Service":
			object = &corev1.Service{}
		case "EndpointSlice":
			object = &discoveryv1.EndpointSlice{}
		case "Pod":
			object = &corev1.Pod{}
		default:
			t.Fatalf("kind %q:\n%s", kind.Kind, text)
		}
		if err := yaml.UnmarshalStrict([]byte(text), object); err != nil {
			t.Fatal(err)
		}
		kept, err := trim(object)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, kept)
	}
	return list
}

func (m *model) set(objects ...any) {
	for _, object := range objects {
		switch o := object.(type) {
		case *corev1.Service:
			m.setService(o)
		case *discoveryv1.EndpointSlice:
			m.setSlice(o)
		case *corev1.Pod:
			m.setPod(o)
		}
	}
}

// web is a dual-stack service of two pods whose port has a name and two numbers.
const web = `kind: Service
metadata: {namespace: shop, name: web, labels: {team: a}}
spec:
  clusterIP: 10.96.0.7
  clusterIPs: [10.96.0.7, "fd00:96::7"]
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http, protocol: TCP, appProtocol: http}
  - {name: dns, port: 53, protocol: UDP}
  - {name: admin, port: 9000, targetPort: 9001, protocol: TCP}
---
kind: Pod
metadata: {namespace: shop, name: web-1, uid: one, labels: {app: web}, managedFields: [{manager: x}]}
spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: c, image: i}]}
status:
  phase: Running
  podIP: 10.244.1.5
  podIPs: [{ip: "fd00:244::5"}, {ip: 10.244.1.5}]
  conditions: [{type: Ready, status: "True"}, {type: Initialized, status: "True"}]
---
kind: Pod
metadata: {namespace: shop, name: web-2, uid: two, labels: {app: web}}
spec: {nodeName: node-2, containers: [{name: c, image: i}]}
status: {phase: Running, podIPs: [{ip: 10.244.2.5}]}
---
kind: EndpointSlice
metadata: {namespace: shop, name: web-4a, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}, {name: admin, port: 9001, protocol: TCP}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.244.1.5], conditions: {ready: true, serving: true, terminating: false}, zone: z1, hints: {forZones: [{name: z2}, {name: z1}]}, targetRef: {kind: Pod, namespace: shop, name: web-1, uid: one}}
---
kind: EndpointSlice
metadata: {namespace: shop, name: web-4b, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 18080, protocol: TCP}, {name: admin, port: 9001, protocol: TCP}]
endpoints:
- {addresses: [10.244.2.5], conditions: {ready: false, serving: true, terminating: true}, zone: z2, targetRef: {kind: Pod, namespace: shop, name: web-2, uid: two}}
---
kind: EndpointSlice
metadata: {namespace: shop, name: web-6, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080, protocol: TCP}, {name: admin, port: 9001, protocol: TCP}]
endpoints:
- {addresses: ["fd00:244::5"], conditions: {ready: true}, zone: z1, targetRef: {kind: Pod, namespace: shop, name: web-1, uid: one}}
`

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, t := range texts {
		list = append(list, netip.MustParseAddr(t))
	}
	return list
}

// webService is what web means.
func webService() Service {
	return Service{
		DeclaredService: discovery.DeclaredService{
			Namespace: "shop", Name: "web", Selector: map[string]string{"app": "web"}, ClusterIPs: addrs("10.96.0.7", "fd00:96::7"),
			Ports: []discovery.DeclaredPort{
				{Port: assay.Port{Name: "http", Port: 80, Protocol: assay.HTTP1}},
				{Port: assay.Port{Name: "admin", Port: 9000}, Target: 9001},
			},
			Notes: []string{"spec.ports[1].protocol: UDP passes outside the mesh and is listed as an exception"},
		},
		Places: []discovery.Place{
			{Workload: "one", Addrs: addrs("10.244.1.5", "fd00:244::5"), Targets: []uint16{8080, 9001}, Zone: "z1", Zones: []string{"z1", "z2"}, Ready: true, Serving: true},
			{Workload: "two", Addrs: addrs("10.244.2.5"), Targets: []uint16{18080, 9001}, Zone: "z2", Serving: true, Terminating: true},
		},
	}
}

func webPods() []Pod {
	return []Pod{
		{UID: "one", Namespace: "shop", Name: "web-1", Account: "web", Node: "node-1", Addrs: addrs("10.244.1.5", "fd00:244::5"), Labels: map[string]string{"app": "web"}, Ready: true},
		{UID: "two", Namespace: "shop", Name: "web-2", Account: "default", Node: "node-2", Addrs: addrs("10.244.2.5"), Labels: map[string]string{"app": "web"}},
	}
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s\n got %+v\nwant %+v", what, got, want)
	}
}

// TestOrderDoesNotMatter: the same objects mean the same in every order, and all at
// once or one by one.
func TestOrderDoesNotMatter(t *testing.T) {
	objects := read(t, web)
	for n := range 200 {
		random := rand.New(rand.NewPCG(uint64(n), 7))
		order := slices.Clone(objects)
		random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		m := newModel()
		services, pods := map[string]Service{}, map[string]Pod{}
		for _, o := range order {
			m.set(o)
			if random.IntN(2) == 0 {
				continue
			}
			for _, s := range m.changes().Services {
				services[s.Key()] = s
			}
			for uid, p := range m.outPods {
				pods[uid] = p
			}
		}
		for _, s := range m.changes().Services {
			services[s.Key()] = s
		}
		for uid, p := range m.outPods {
			pods[uid] = p
		}
		same(t, fmt.Sprintf("order %d: services", n), services, map[string]Service{"shop/web": webService()})
		want := webPods()
		same(t, fmt.Sprintf("order %d: pods", n), pods, map[string]Pod{"one": want[0], "two": want[1]})
		if again := m.changes(); !again.Empty() {
			t.Errorf("order %d: nothing has changed, but %+v", n, again)
		}
	}
}

// TestGone: what is removed is told of once, and nothing is remembered of it.
func TestGone(t *testing.T) {
	m := newModel()
	objects := read(t, web)
	m.set(objects...)
	m.changes()

	m.removeSlice("shop", "web-4b")
	c := m.changes()
	want := webService()
	want.Places = want.Places[:1]
	same(t, "without the second pod's slice", c, Changes{Services: []Service{want}})

	m.removePod("one")
	c = m.changes()
	want.Places = nil
	same(t, "without the first pod", c, Changes{Services: []Service{want}, RemovedPods: []string{"one"}})

	m.removeService("shop", "web")
	same(t, "without the service", m.changes(), Changes{RemovedServices: []string{"shop/web"}})
	for _, name := range []string{"web-4a", "web-6", "never"} {
		m.removeSlice("shop", name)
	}
	m.removePod("two")
	m.removePod("never")
	same(t, "without the second pod", m.changes(), Changes{RemovedPods: []string{"two"}})
	if len(m.services)+len(m.slices)+len(m.owner)+len(m.pods)+len(m.inSlices)+len(m.out)+len(m.outPods) > 0 {
		t.Errorf("something is remembered: %+v", m)
	}
}

// TestNewList: what went, and what was replaced under its name, while nobody watched.
func TestNewList(t *testing.T) {
	m := newModel()
	m.set(read(t, web)...)
	m.changes()
	again := read(t, web)[2].(*corev1.Pod)
	again.UID, again.Status.PodIPs = "three", []corev1.PodIP{{IP: "10.244.2.9"}}
	m.retainPods([]any{read(t, web)[1], again})
	m.set(again)
	m.retainSlices([]any{read(t, web)[3]})
	c := m.changes()
	want, pod := webService(), webPods()[1]
	want.Places = want.Places[:1]
	want.Places[0].Addrs = want.Places[0].Addrs[:1]
	pod.UID, pod.Addrs = "three", addrs("10.244.2.9")
	same(t, "the new list", c, Changes{Services: []Service{want}, Pods: []Pod{pod}, RemovedPods: []string{"two"}})
	m.retainServices(nil)
	m.retainSlices(nil)
	m.retainPods(nil)
	same(t, "an empty list", m.changes(), Changes{RemovedServices: []string{"shop/web"}, RemovedPods: []string{"one", "three"}})
	if len(m.slices)+len(m.owner)+len(m.inSlices) > 0 {
		t.Errorf("something is remembered: %+v", m)
	}
}

// TestForgedSlice: who can write a slice cannot make a pod of an address that it does
// not have, nor a live one of a dead one.
func TestForgedSlice(t *testing.T) {
	m := newModel()
	m.set(read(t, web)...)
	m.changes()
	forged := read(t, `kind: EndpointSlice
metadata: {namespace: shop, name: forged, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 666, protocol: TCP}]
endpoints:
- {addresses: [192.0.2.1], targetRef: {kind: Pod, namespace: shop, name: web-1, uid: one}}
- {addresses: [192.0.2.2], targetRef: {kind: Pod, namespace: shop, name: ghost, uid: ghost}}
- {addresses: [192.0.2.3]}
- {addresses: []}
- {addresses: [not-an-address]}
`)
	m.set(forged...)
	want := webService()
	want.Places = append([]discovery.Place{{Addrs: addrs("192.0.2.3"), Targets: []uint16{666, 0}, Ready: true, Serving: true}}, want.Places...)
	same(t, "the forged slice", m.changes(), Changes{Services: []Service{want}})
}

// TestPodEnds: a job's pod that has ended is no place, though its slice lags behind.
func TestPodEnds(t *testing.T) {
	m := newModel()
	objects := read(t, web)
	m.set(objects...)
	m.changes()
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		ended := objects[1].(*corev1.Pod).DeepCopy()
		ended.Status.Phase = phase
		m.set(ended)
		want := webService()
		want.Places = want.Places[1:]
		same(t, string(phase), m.changes(), Changes{Services: []Service{want}, RemovedPods: []string{"one"}})
		m.set(objects[1])
		m.changes()
	}
}

// TestPodWithoutAddress: a pod is known as soon as it has a node, and is a place only when
// it has an address.
func TestPodWithoutAddress(t *testing.T) {
	m := newModel()
	objects := read(t, web)
	pod := objects[1].(*corev1.Pod)
	early := pod.DeepCopy()
	early.Spec.NodeName, early.Status = "", corev1.PodStatus{Phase: corev1.PodPending}
	m.set(early)
	same(t, "a pod that waits for its node", m.changes().Pods, []Pod(nil))
	placed := early.DeepCopy()
	placed.Spec.NodeName = pod.Spec.NodeName
	m.set(append(slices.Delete(slices.Clone(objects), 1, 2), placed)...)
	c := m.changes()
	want, known := webService(), webPods()
	want.Places = want.Places[1:]
	known[0].Addrs, known[0].Ready = nil, false
	same(t, "its services", c.Services, []Service{want})
	same(t, "a pod without an address", c.Pods, known)
	m.set(pod)
	same(t, "with its address", m.changes(), Changes{Services: []Service{webService()}, Pods: webPods()[:1]})
}

// TestNodes: nodes are told of when they come and go or are in another zone, and not when
// anything else of them changes.
func TestNodes(t *testing.T) {
	node := func(name, zone string) *corev1.Node {
		kept, err := trim(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"topology.kubernetes.io/zone": zone, "x": "y"}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: "fd00::1"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}}})
		if err != nil {
			t.Fatal(err)
		}
		return kept.(*corev1.Node)
	}
	own := addrs("192.0.2.1", "fd00::1")
	m := newModel()
	m.changes()
	m.setNode(node("b", "west"))
	m.setNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	same(t, "two nodes", m.changes(), Changes{Nodes: []Node{{Name: "a"}, {Name: "b", Zone: "west", Addrs: own}}})
	m.setNode(node("b", "west"))
	same(t, "the same", m.changes(), Changes{})
	m.setNode(node("b", "east"))
	same(t, "another zone", m.changes(), Changes{Nodes: []Node{{Name: "b", Zone: "east", Addrs: own}}})
	m.removeNode("a")
	m.setNode(node("a", "")) // made anew meanwhile: who asks by name sees no difference
	m.retainNodes(nil)
	m.setNode(node("c", ""))
	same(t, "a new list", m.changes(), Changes{Nodes: []Node{{Name: "c", Addrs: own}}, RemovedNodes: []string{"a", "b"}})
}

// TestAgentless: nodes that cannot have an agent are known by their labels.
func TestAgentless(t *testing.T) {
	for name, c := range map[string]struct {
		labels map[string]string
		want   bool
	}{
		"nothing said":    {nil, false},
		"linux":           {map[string]string{"kubernetes.io/os": "linux", "eks.amazonaws.com/compute-type": "ec2", "type": "large"}, false},
		"windows":         {map[string]string{"kubernetes.io/os": "windows"}, true},
		"virtual-kubelet": {map[string]string{"kubernetes.io/os": "linux", "type": "virtual-kubelet"}, true},
		"Fargate":         {map[string]string{"kubernetes.io/os": "linux", "eks.amazonaws.com/compute-type": "fargate"}, true},
	} {
		kept, err := trim(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: c.labels}})
		if err != nil {
			t.Fatal(err)
		}
		m := newModel()
		m.changes()
		m.setNode(kept.(*corev1.Node))
		same(t, name, m.changes(), Changes{Nodes: []Node{{Name: "n", Agentless: c.want}}})
	}
}

// TestSliceMovesOn: a slice that comes to name another service leaves the first.
func TestSliceMovesOn(t *testing.T) {
	m := newModel()
	m.set(read(t, web)...)
	m.changes()
	moved := read(t, web)[4].(*discoveryv1.EndpointSlice)
	moved.Labels = map[string]string{discoveryv1.LabelServiceName: "other"}
	m.set(moved)
	want := webService()
	want.Places = want.Places[:1]
	same(t, "the first service", m.changes(), Changes{Services: []Service{want}})
	m.set(read(t, `kind: Service
metadata: {namespace: shop, name: other}
spec: {clusterIP: None, clusterIPs: [None], ports: [{name: http, port: 80}]}
`)...)
	c := m.changes()
	if len(c.Services) != 1 || len(c.Services[0].Places) != 1 || c.Services[0].Places[0].Workload != "two" || !c.Services[0].Headless || len(c.Services[0].ClusterIPs) > 0 {
		t.Errorf("the other service: %+v", c)
	}
}

// balanced is the status of a service that has a load balancer, one of whose addresses must be
// reached through it.
const balanced = "\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.7, ipMode: VIP}, {ip: \"2001:db8::7\"}, {ip: 192.0.2.8, ipMode: Proxy}, {hostname: x.example.com}]}}"

// TestHosts: places of a service that is local say where they are, and hints say for which
// nodes and zones they are.
func TestHosts(t *testing.T) {
	m := newModel()
	objects := read(t, web)
	service, slice := objects[0].(*corev1.Service), objects[3].(*discoveryv1.EndpointSlice)
	local := corev1.ServiceInternalTrafficPolicyLocal
	service.Spec.InternalTrafficPolicy = &local
	e := &slice.Endpoints[0]
	e.NodeName, e.Hints.ForNodes = pointer("node-1"), []discoveryv1.ForNode{{Name: "node-2"}, {Name: "node-1"}}
	m.set(service, objects[1], slice)
	got := m.changes().Services
	if len(got) != 1 || !got[0].Local || got[0].Places[0].Host != "node-1" {
		t.Fatalf("%+v", got)
	}
	same(t, "hints for nodes", got[0].Places[0].Hosts, []string{"node-1", "node-2"})
	same(t, "hints for zones", got[0].Places[0].Zones, []string{"z1", "z2"})
	service = service.DeepCopy()
	service.Spec.InternalTrafficPolicy = nil
	m.set(service)
	if got := m.changes().Services; len(got) != 1 || got[0].Places[0].Host != "" {
		t.Errorf("of a service that is not local: %+v", got)
	}
}

// noted reports whether a service has one note for each of the fields, in that order.
func noted(s Service, fields ...string) bool {
	return slices.EqualFunc(s.Notes, fields, func(note, field string) bool { return strings.HasPrefix(note, field+": ") })
}

// TestKinds: what is special about some services.
func TestKinds(t *testing.T) {
	for name, c := range map[string]struct {
		spec  string
		want  func(Service) bool
		there bool
	}{
		"external name": {`{type: ExternalName, externalName: db.example.com.}`, func(s Service) bool {
			return s.ExternalName == "db.example.com" && len(s.Ports) == 0 && len(s.Notes) == 1
		}, true},
		"no TCP port":     {`{clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 53, protocol: UDP}]}`, nil, false},
		"no port":         {`{clusterIP: None, clusterIPs: [None]}`, nil, false},
		"affinity":        {`{clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], sessionAffinity: ClientIP, ports: [{port: 80}]}`, func(s Service) bool { return len(s.Notes) == 0 && s.Affinity == 3*time.Hour }, true},
		"affinity's time": {`{clusterIP: 10.96.0.1, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 7}}, ports: [{port: 80}]}`, func(s Service) bool { return s.Affinity == 7*time.Second }, true},
		"local":           {`{clusterIP: 10.96.0.1, internalTrafficPolicy: Local, ports: [{port: 80}]}`, func(s Service) bool { return len(s.Notes) == 0 && s.Local }, true},
		"headless":        {`{clusterIP: None, clusterIPs: [None], internalTrafficPolicy: Local, sessionAffinity: ClientIP, ports: [{port: 80}]}`, func(s Service) bool { return len(s.Notes) == 2 && !s.Local && s.Affinity == 0 }, true},
		"load balancer": {`{type: LoadBalancer, clusterIP: 10.96.0.1, externalTrafficPolicy: Local, externalIPs: [192.0.2.9], ports: [{port: 80, nodePort: 30080}]}` + balanced, func(s Service) bool {
			return noted(s, "spec.externalTrafficPolicy") && reflect.DeepEqual(s.Externals, addrs("192.0.2.7", "192.0.2.9", "2001:db8::7")) && s.Ports[0].NodePort == 30080
		}, true},
		"node port": {`{type: NodePort, clusterIP: 10.96.0.1, externalTrafficPolicy: Cluster, ports: [{port: 80, nodePort: 30080}]}`, func(s Service) bool { return noted(s) && s.Ports[0].NodePort == 30080 }, true},
		"local from outside": {`{type: NodePort, clusterIP: 10.96.0.1, externalTrafficPolicy: Local, ports: [{port: 80, nodePort: 30080}]}`, func(s Service) bool {
			return noted(s, "spec.externalTrafficPolicy") && s.Ports[0].NodePort == 30080
		}, true},
		"local node port": {`{type: NodePort, clusterIP: 10.96.0.1, internalTrafficPolicy: Local, externalTrafficPolicy: Local, ports: [{port: 80, nodePort: 30080}]}`, func(s Service) bool {
			return noted(s, "spec.internalTrafficPolicy") && s.Local && s.Ports[0].NodePort == 0
		}, true},
		"local balancer":    {`{type: LoadBalancer, clusterIP: 10.96.0.1, internalTrafficPolicy: Local, ports: [{port: 80}]}` + balanced, func(s Service) bool { return len(s.Notes) == 1 && s.Externals == nil }, true},
		"balanced for some": {`{type: LoadBalancer, clusterIP: 10.96.0.1, loadBalancerSourceRanges: [192.0.2.0/24], ports: [{port: 80}]}` + balanced, func(s Service) bool { return len(s.Notes) == 1 && s.Externals == nil }, true},
		"IPv6 first":        {`{clusterIP: "fd00::1", clusterIPs: ["fd00::1", 10.96.0.1], ports: [{port: 80}]}`, func(s Service) bool { return reflect.DeepEqual(s.ClusterIPs, addrs("10.96.0.1", "fd00::1")) }, true},
		"unknown protocol":  {`{clusterIP: 10.96.0.1, ports: [{port: 80, appProtocol: "example.com/own"}]}`, func(s Service) bool { return len(s.Notes) == 1 && s.Ports[0].Protocol == assay.Detect }, true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newModel()
			m.set(read(t, "kind: Service\nmetadata: {namespace: a, name: b}\nspec: "+c.spec+"\n")...)
			got := m.changes().Services
			if len(got) > 0 != c.there || c.there && !c.want(got[0]) {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestOneTranslation: a Service means the same in a folder and in a cluster.
func TestOneTranslation(t *testing.T) {
	const text = `apiVersion: v1
kind: Service
metadata:
  name: db
  namespace: shop
  annotations: {assay.dev/proxy-protocol: v2}
spec:
  selector: {app: db}
  ports:
  - {name: pg, port: 5432, targetPort: 15432, appProtocol: postgresql}
`
	intent, _, err := kube.Translate([]discovery.File{{Name: "db.yaml", YAML: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	m := newModel()
	m.set(read(t, text)...)
	got := m.changes().Services
	if len(got) != 1 {
		t.Fatalf("%+v", got)
	}
	same(t, "the service", got[0].DeclaredService, intent.Services[0])
}

// TestBadAnnotation: in a cluster a feature that cannot be had is a note, and the
// service is there without it.
func TestBadAnnotation(t *testing.T) {
	m := newModel()
	m.set(read(t, `kind: Service
metadata: {namespace: a, name: b, annotations: {assay.dev/proxy-protocol: v2, assay.dev/forward-client-cert: maybe}}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80, appProtocol: http}]}
`)...)
	got := m.changes().Services
	if len(got) != 1 || len(got[0].Notes) != 2 || got[0].Ports[0].ProxyProtocol || got[0].Ports[0].ForwardClientCert {
		t.Errorf("%+v", got)
	}
}

// TestPodIsPartOfItsServices: a change of a pod is computed for its services alone.
func TestPodIsPartOfItsServices(t *testing.T) {
	m := newModel()
	for i := range 100 {
		name := fmt.Sprintf("s%d", i)
		uid := types.UID("pod-" + name)
		address := fmt.Sprintf("10.1.0.%d", i)
		pod := read(t, web)[1].(*corev1.Pod)
		pod.UID, pod.Status.PodIPs = uid, []corev1.PodIP{{IP: address}}
		service := read(t, web)[0].(*corev1.Service)
		service.Name = name
		slice := read(t, web)[3].(*discoveryv1.EndpointSlice)
		slice.Name, slice.Labels = name, map[string]string{discoveryv1.LabelServiceName: name}
		slice.Endpoints[0].Addresses, slice.Endpoints[0].TargetRef.UID = []string{address}, uid
		m.set(pod, service, slice)
	}
	if c := m.changes(); len(c.Services) != 100 || len(c.Pods) != 100 {
		t.Fatalf("%d services, %d pods", len(c.Services), len(c.Pods))
	}
	m.removePod("pod-s7")
	if len(m.touched) != 1 {
		t.Errorf("a pod's end touches %d services", len(m.touched))
	}
	if c := m.changes(); len(c.Services) != 1 || c.Services[0].Name != "s7" || len(c.Services[0].Places) != 0 {
		t.Errorf("%+v", c)
	}
}
