package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"assay.dev"
	"assay.dev/agent"
	"assay.dev/api"
)

// host is a node's agent without pods: it joins, renews and is verified by the agent's own
// client, and speaks what an agent speaks. It keeps the versions of what it was told.
type host struct {
	node    *node
	api     *apiServer
	tracked *tracker
	remote  *agent.Remote
	id      string
	csr     []byte
	signing chan struct{} // requests for certificates
	log     *slog.Logger

	mu      sync.Mutex
	pods    map[string]*meshed
	known   map[string]*uint64
	epoch   uint64
	version uint64 // of the bundle
	stream  grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate]
	cut     context.CancelFunc
	sending sync.Mutex

	whole   atomic.Bool  // everything was told on this stream
	wholeAt atomic.Int64 // when, in nanoseconds
	issued  atomic.Int64
	refused atomic.Int64
}

// meshed is a pod with a proxy.
type meshed struct {
	message *api.Workload
	report  encoded
	certify bool // has no certificate yet
}

func newHost(n *node, a *apiServer, t *tracker, address, dir string, log *slog.Logger) (*host, error) {
	h := &host{node: n, api: a, tracked: t, pods: map[string]*meshed{}, known: map[string]*uint64{}, signing: make(chan struct{}, 4), log: log}
	sum := sha256.Sum256([]byte(n.name))
	h.id = "node-" + hex.EncodeToString(sum[:8])
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if h.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return nil, err
	}
	h.remote, err = agent.Connect(context.Background(), agent.RemoteConfig{
		Address: address, DataDir: dir, HostName: n.name, Log: slog.New(slog.DiscardHandler),
		Node: &agent.NodeJoin{
			Token: func() (string, error) { return agentToken(n.name), nil },
			Roots: func(context.Context) ([]*x509.Certificate, error) { return a.roots() },
		},
	})
	n.host = h
	return h, err
}

// run is the host's life.
func (h *host) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	defer h.remote.Close()
	all.Go(func() { h.remote.Run(ctx) }) // returns when ctx ends
	all.Go(func() { h.reports(ctx) })
	// An agent's patience.
	const first, most = 100 * time.Millisecond, 5 * time.Second
	for retry := first; ctx.Err() == nil; retry = min(2*retry, most) {
		began := time.Now()
		if err := h.sync(ctx); err != nil && ctx.Err() == nil {
			h.log.Debug("stream ended", "host", h.node.name, "err", err)
		}
		if time.Since(began) > most {
			retry = first
		}
		if pause(ctx, retry/2+mathrand.N(retry)) != nil {
			return
		}
	}
}

// disconnect ends the stream, as a network that fails does; the host opens another.
func (h *host) disconnect() {
	h.whole.Store(false)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cut != nil {
		h.cut()
	}
}

// sync is one stream.
func (h *host) sync(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := h.remote.Sync(ctx, grpc.ForceCodecV2(lazy{}))
	if err != nil {
		return err
	}
	h.whole.Store(false)
	h.mu.Lock()
	hello := &api.HostHello{Build: "scale", HostName: h.node.name, Epoch: h.epoch, Known: make(map[string]uint64, len(h.known)), Advertise: h.node.addr.AsSlice()}
	for key, v := range h.known {
		hello.Known[key] = *v
	}
	h.mu.Unlock()
	if err := stream.SendMsg(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: hello}}); err != nil {
		return errors.Join(err, stream.RecvMsg(unread{func([]byte) error { return nil }}))
	}
	var first api.ControlUpdate
	if err := stream.RecvMsg(&first); err != nil {
		return err
	}
	h.mu.Lock()
	if epoch := first.GetWelcome().GetEpoch(); epoch != h.epoch {
		h.epoch = epoch
		clear(h.known)
	}
	h.stream, h.cut = stream, cancel
	pods := make([]*meshed, 0, len(h.pods))
	for _, p := range h.pods {
		pods = append(pods, p)
	}
	h.mu.Unlock()
	var sender sync.WaitGroup
	defer sender.Wait()
	defer cancel()
	sender.Go(func() {
		for _, p := range pods {
			h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: p.message}})
		}
		h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_Synced{Synced: &api.Synced{}}})
		h.acknowledge(stream)
	})
	for {
		if err := stream.RecvMsg(unread{func(b []byte) error { return h.take(ctx, stream, b) }}); err != nil {
			h.mu.Lock()
			h.stream = nil
			h.mu.Unlock()
			h.whole.Store(false)
			return err
		}
	}
}

// send sends one update; when the stream has ended, its reader says so.
func (h *host) send(stream grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate], v any) {
	h.sending.Lock()
	defer h.sending.Unlock()
	stream.SendMsg(v)
}

// acknowledge says that everybody here trusts the newest bundle.
func (h *host) acknowledge(stream grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate]) {
	h.mu.Lock()
	version := h.version
	ids := []string{""}
	for id := range h.pods {
		ids = append(ids, id)
	}
	h.mu.Unlock()
	if version == 0 {
		return
	}
	for _, id := range ids {
		h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_BundleAck{BundleAck: &api.BundleAck{WorkloadId: id, Version: version}}})
	}
}

// take takes in what control says (api.ControlUpdate, by its numbers).
func (h *host) take(ctx context.Context, stream grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate], b []byte) error {
	bytesIn.Add(int64(len(b)))
	return fields(b, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 2:
			return h.delta(value)
		case 3:
			var bundle api.Bundle
			if err := proto.Unmarshal(value, &bundle); err != nil {
				return err
			}
			h.mu.Lock()
			h.version = bundle.GetVersion()
			h.mu.Unlock()
			if err := h.remote.SetBundle(&bundle); err != nil {
				return err
			}
			go h.acknowledge(stream)
		case 4:
			var a api.Accepted
			if err := proto.Unmarshal(value, &a); err != nil {
				return err
			}
			h.accepted(ctx, a.GetWorkloadId())
		case 5:
			var r api.Refused
			if err := proto.Unmarshal(value, &r); err != nil {
				return err
			}
			h.refused.Add(1)
			h.log.Warn("control refuses a pod", "host", h.node.name, "pod", r.GetWorkloadId(), "reason", r.GetReason())
		}
		return nil
	})
}

// delta takes in an api.Delta.
func (h *host) delta(b []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	complete := false
	err := fields(b, func(number protowire.Number, value []byte, integer uint64) error {
		switch number {
		case 2:
			var key []byte
			var version uint64
			if err := fields(value, func(number protowire.Number, v []byte, n uint64) error {
				switch number {
				case 1:
					key = v
				case 2:
					version = n
				}
				return nil
			}); err != nil {
				return err
			}
			if at := h.known[string(key)]; at != nil {
				*at = version
			} else {
				h.known[interned(key)] = &version
			}
			h.tracked.heard(h, key, value)
		case 3:
			delete(h.known, string(value))
		case 4:
			complete = complete || integer != 0
		}
		return nil
	})
	if complete && !h.whole.Load() {
		h.wholeAt.Store(time.Now().UnixNano())
		h.whole.Store(true)
	}
	return err
}

// keys are those of all hosts, once.
var keys sync.Map

func interned(b []byte) string {
	s, _ := keys.LoadOrStore(string(b), string(b))
	return s.(string)
}

func (h *host) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.known)
}

// accepted gets the pod's proxy its first certificate.
func (h *host) accepted(ctx context.Context, id string) {
	h.mu.Lock()
	p := h.pods[id]
	due := p != nil && p.certify
	if due {
		p.certify = false
	}
	h.mu.Unlock()
	if due {
		go h.certify(ctx, p)
	}
}

// certify gets a certificate for a proxy: its first, or one that replaces another.
func (h *host) certify(ctx context.Context, p *meshed) {
	select { // a node meshes a few pods at a time
	case h.signing <- struct{}{}:
		defer func() { <-h.signing }()
	case <-ctx.Done():
		return
	}
	for {
		within, cancel := context.WithTimeout(ctx, 10*time.Second)
		answer, err := h.remote.Issue(within, &api.IssueRequest{WorkloadId: p.message.GetId(), Csr: h.csr, Artifacts: p.message.GetArtifacts()})
		cancel()
		if err == nil && len(answer.GetChain()) > 0 {
			h.issued.Add(1)
			return
		}
		h.mu.Lock()
		there := h.pods[p.message.GetId()] == p
		h.mu.Unlock()
		if !there || pause(ctx, time.Second+mathrand.N(2*time.Second)) != nil { // a proxy's patience
			return
		}
		h.log.Debug("no certificate yet", "pod", p.message.GetId(), "err", err, "refused", answer.GetRefused())
	}
}

// mesh makes a pod one of the host's without telling.
func (h *host) mesh(p *pod, peers []*pod) {
	m := &meshed{certify: true, message: api.FromWorkload(&assay.Workload{
		ID: p.uid, Namespace: p.service.namespace, Name: p.service.name, Host: h.id, Zone: h.node.zone, Identity: p.identity(), Addrs: []netip.Addr{p.addr},
		Listening: []uint16{8080, 9090}, MeshedSince: time.Now(), Artifacts: assay.ArtifactSet{{Kind: assay.Image, Name: "app", Digest: image}},
	})}
	if len(peers) > 0 {
		m.report = reportOf(p, peers)
	}
	h.mu.Lock()
	h.pods[p.uid] = m
	h.mu.Unlock()
}

// up tells of a new pod.
func (h *host) up(p *pod, peers []*pod) {
	h.mesh(p, peers)
	h.mu.Lock()
	stream, m := h.stream, h.pods[p.uid]
	version := h.version
	h.mu.Unlock()
	if stream == nil {
		return // the next one begins with all
	}
	h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: m.message}})
	h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_BundleAck{BundleAck: &api.BundleAck{WorkloadId: p.uid, Version: version}}})
}

// gone tells of one that has ended.
func (h *host) gone(p *pod) {
	h.mu.Lock()
	delete(h.pods, p.uid)
	stream := h.stream
	h.mu.Unlock()
	if stream != nil {
		h.send(stream, &api.HostUpdate{Update: &api.HostUpdate_WorkloadGone{WorkloadGone: p.uid}})
	}
}

// reports sends once a second what the proxies of all pods have counted: in a mesh with
// traffic everywhere all of them change in every second. And it renews certificates, each
// twice a day.
func (h *host) reports(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	const renewEvery = 12 * 60 * 60 // seconds
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		h.mu.Lock()
		stream := h.stream
		var list []encoded
		var renew *meshed
		for _, p := range h.pods {
			if p.report != nil {
				list = append(list, p.report)
			}
			renew = p
		}
		due := len(h.pods) > 0 && mathrand.IntN(renewEvery) < len(h.pods)
		h.mu.Unlock()
		if stream == nil || !h.whole.Load() {
			continue
		}
		for _, r := range list {
			h.send(stream, r)
		}
		if due {
			go h.certify(ctx, renew)
		}
	}
}

const image = assay.Digest("sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae")

// reportOf is what a proxy has counted.
func reportOf(p *pod, peers []*pod) encoded {
	r := &api.Report{Workload: p.uid, Started: time.Now().Add(-time.Hour), Counted: time.Now(), Counters: assay.Counters{Handshakes: 120, Detections: map[string]uint64{"http1": 120}}}
	for i, peer := range peers { // half of them ask it, and it asks half of them
		s := assay.Signals{SignalKey: assay.SignalKey{Direction: assay.Inbound, Peer: peer.identity(), PeerArtifacts: image, Service: p.service.namespace + "/" + p.service.name, Port: 80, Protocol: assay.HTTP1, Security: assay.MutualTLS},
			Requests: 1_000_000 + uint64(i), Failures: 12, Opened: 120, BytesIn: 300_000_000, BytesOut: 900_000_000, Open: 2, InFlight: 1, FirstSeen: time.Now().Add(-time.Hour), LastSeen: time.Now()}
		if i%2 == 1 {
			s.Direction, s.Service = assay.Outbound, peer.service.namespace+"/"+peer.service.name
		}
		for b := 10; b < 26; b++ { // half a millisecond to a hundred
			s.Latency.Buckets[b] = uint64(1_000_000 >> (b - 10))
		}
		r.Signals = append(r.Signals, s)
	}
	b, err := proto.Marshal(api.ReportUpdate(api.FromReport(r)))
	if err != nil {
		panic(fmt.Sprintf("scale: a report that cannot be encoded: %v", err))
	}
	return b
}
