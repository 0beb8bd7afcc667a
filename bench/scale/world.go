package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"

	"assay.dev"
)

// world is a cluster: nodes, and services with the pods behind them. What it becomes is
// written to the API server.
type world struct {
	api      *apiServer
	nodes    []*node
	services []*service
	real     *service // of a node more: its pods are meshed by a real agent, and stay; nil: none
	// speaksWith is with how many others each pod has traffic.
	speaksWith int

	mu     sync.Mutex
	random *rand.Rand // the same in every run
	serial int        // of pods
}

type node struct {
	index int
	name  string
	zone  string
	addr  netip.Addr
	next  int // of its addresses
	host  *host
}

type service struct {
	index           int
	namespace, name string
	addr            netip.Addr
	pods            []*pod
	busy            bool // a change of it is not everywhere yet
}

type pod struct {
	uid, name string
	service   *service
	node      *node
	addr      netip.Addr
	started   bool // the kubelet has told its address
	ready     bool
	ending    bool
}

// The shape of the cluster: one in five hundred pods has a service of a hundred, the others
// are about four to a service.
const (
	podsPerNode     = 96
	podsPerService  = 5
	podsPerLarge    = 500 // one service of largeService pods for so many
	largeService    = 100
	namespaces      = 20
	addressesOfNode = 1024
)

func newWorld(api *apiServer, pods, speaksWith int) *world {
	w := &world{api: api, speaksWith: speaksWith, random: rand.New(rand.NewPCG(1, uint64(pods)))}
	for i := range max(1, (pods+podsPerNode/2)/podsPerNode) {
		w.nodes = append(w.nodes, &node{index: i, name: fmt.Sprintf("node-%d.eu-1.example", i), zone: fmt.Sprintf("eu-1%c", 'a'+i%3), addr: addrAt("192.168.0.10", i)})
	}
	services := max(2, pods/podsPerService)
	large := pods / podsPerLarge
	for i := range services {
		w.services = append(w.services, &service{index: i, namespace: fmt.Sprintf("team-%d", i%namespaces), name: fmt.Sprintf("service-%d", i), addr: addrAt("10.96.0.10", i)})
	}
	small := w.services[large:]
	for i := range pods {
		s := small[i%len(small)]
		if i < large*largeService {
			s = w.services[i/largeService]
		}
		p := w.newPod(s, w.nodes[i%len(w.nodes)])
		p.started, p.ready = true, true
		s.pods = append(s.pods, p)
	}
	return w
}

func (w *world) newPod(s *service, n *node) *pod {
	p := &pod{uid: uid(2, w.serial), name: fmt.Sprintf("%s-7c5ddbdf54-%05x", s.name, w.serial), service: s, node: n, addr: addrAt("10.128.0.0", n.index*addressesOfNode+2+n.next%(addressesOfNode-4))}
	w.serial++
	n.next++
	return p
}

// addReal adds a node with its pods.
func (w *world) addReal() {
	i := len(w.nodes)
	n := &node{index: i, name: "real.eu-1.example", zone: "eu-1a", addr: addrAt("192.168.0.10", i)}
	w.real = &service{index: len(w.services), namespace: "real", name: "application", addr: addrAt("10.96.0.10", len(w.services))}
	for range podsPerNode {
		p := w.newPod(w.real, n)
		p.started, p.ready = true, true
		w.real.pods = append(w.real.pods, p)
	}
}

// write writes all of it.
func (w *world) write() {
	nodes, services := w.nodes, w.services
	if w.real != nil {
		nodes, services = append(slices.Clone(nodes), w.real.pods[0].node), append(slices.Clone(services), w.real)
	}
	for _, n := range nodes {
		w.api.put(n.object())
	}
	for _, s := range services {
		w.api.put(s.object())
		for _, p := range s.pods {
			w.api.put(p.object())
		}
		w.api.put(s.slice())
	}
}

// resources is how many pieces the snapshot of a host has when all is told.
func (w *world) resources() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.nodes) + len(w.services)
	inUse := map[string]bool{}
	for _, s := range w.services {
		n += len(s.pods)
		if len(s.pods) > 0 {
			inUse[s.namespace] = true
		}
	}
	if w.real != nil {
		n += 3 + len(w.real.pods) // node, service, namespace
	}
	return n + len(inUse)
}

func (w *world) pods() (all []*pod) {
	for _, s := range w.services {
		all = append(all, s.pods...)
	}
	return all
}

// pick returns a service with a pod that runs, and marks it; nil when there is none in a few
// tries. Pods are equally likely.
func (w *world) pick() *pod {
	for range 100 {
		s := w.services[w.random.IntN(len(w.services))]
		if len(s.pods) == 0 || s.busy || w.random.IntN(largeService) >= max(len(s.pods), 4) {
			continue
		}
		s.busy = true
		return s.pods[w.random.IntN(len(s.pods))]
	}
	return nil
}

func (w *world) done(s *service) {
	w.mu.Lock()
	s.busy = false
	w.mu.Unlock()
}

// identity is what a pod's certificate will say.
func (p *pod) identity() assay.Identity {
	return assay.Identity{TrustDomain: trustDomain, Namespace: p.service.namespace, Account: p.service.name}
}

// replace swaps a pod of the service for its successor.
func (s *service) replace(old, next *pod) {
	s.pods = slices.Clone(s.pods)
	s.pods[slices.Index(s.pods, old)] = next
}

// peers are those with whom a pod speaks, a few at random.
func (w *world) peers() (out []*pod) {
	for len(out) < w.speaksWith {
		if s := w.services[w.random.IntN(len(w.services))]; len(s.pods) > 0 {
			out = append(out, s.pods[w.random.IntN(len(s.pods))])
		}
	}
	return out
}
