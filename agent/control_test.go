package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"maps"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

// testControl is the least that an agent needs of control, behind real gRPC: it takes
// every workload, publishes it, and signs every request. The suites in test/ run the
// real one.
type testControl struct {
	api.UnimplementedHostsServer
	key    *ecdsa.PrivateKey
	root   *x509.Certificate
	covers func(namespace, service string) bool

	mu        sync.Mutex
	domain    string // of trust
	version   uint64
	resources map[string]*api.Resource
	streams   map[chan *api.ControlUpdate]bool
	hellos    []*api.HostHello
	reports   map[string]*api.WorkloadReport
	acks      map[string]uint64
	gone      []string
	findings  []*api.Finding
	invalid   []error // for each of which the real one would complain
	requests  int
	issued    map[string][]*api.Artifact
	// pods says that hosts are those of a platform, which tells what each runs: runs.
	pods   bool
	runs   assay.ArtifactSet
	server *grpc.Server
	path   string
}

func newTestControl(t testing.TB) *testControl {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testControl{
		key: key, root: root, domain: "bank.example", resources: map[string]*api.Resource{}, streams: map[chan *api.ControlUpdate]bool{},
		reports: map[string]*api.WorkloadReport{}, acks: map[string]uint64{}, issued: map[string][]*api.Artifact{},
		path:   filepath.Join(t.TempDir(), "control.sock"),
		covers: func(string, string) bool { return true },
	}
}

// start listens; stop ends it like a crash. A client made once finds it again.
func (c *testControl) start(t testing.TB) {
	t.Helper()
	l, err := net.Listen("unix", c.path)
	if err != nil {
		t.Fatal(err)
	}
	c.server = grpc.NewServer()
	api.RegisterHostsServer(c.server, c)
	go c.server.Serve(l)
	t.Cleanup(c.stop)
}

func (c *testControl) stop() { c.server.Stop() }

func (c *testControl) client(t testing.TB) api.HostsClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+c.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return api.NewHostsClient(conn)
}

func (c *testControl) Sync(stream grpc.BidiStreamingServer[api.HostUpdate, api.ControlUpdate]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.hellos = append(c.hellos, first.GetHello())
	out := make(chan *api.ControlUpdate, 1024)
	welcome := &api.Welcome{HostId: "host-1", TrustDomain: c.domain, Epoch: 7}
	if !c.pods {
		welcome.Prefixes = []string{"10.181.7.0/24", "fd5a:5a59:0:0:7::/80"}
		welcome.MeshPrefixes = []string{"10.181.0.0/16", "fd5a:5a59::/64", "10.182.0.0/16", "fd5a:5a59:1::/112"}
	}
	out <- &api.ControlUpdate{Update: &api.ControlUpdate_Welcome{Welcome: welcome}}
	out <- &api.ControlUpdate{Update: &api.ControlUpdate_Bundle{Bundle: api.FromBundle(3, [][]byte{c.root.Raw})}}
	d := &api.Delta{Version: c.version, Complete: true}
	for key, r := range c.resources {
		if v, ok := first.GetHello().GetKnown()[key]; !ok || v != r.GetVersion() {
			d.Upsert = append(d.Upsert, r)
		}
	}
	for key := range first.GetHello().GetKnown() {
		if c.resources[key] == nil {
			d.Remove = append(d.Remove, key)
		}
	}
	out <- &api.ControlUpdate{Update: &api.ControlUpdate_Delta{Delta: d}}
	c.streams[out] = true
	c.mu.Unlock()
	seen := map[string]bool{}
	defer func() {
		c.mu.Lock()
		delete(c.streams, out)
		c.mu.Unlock()
	}()
	go func() {
		for {
			select {
			case u := <-out:
				if stream.Send(u) != nil {
					return
				}
			case <-stream.Context().Done():
				return
			}
		}
	}()
	for {
		u, err := stream.Recv()
		if err != nil {
			return err
		}
		seen["workload/"+u.GetWorkloadUp().GetId()] = true
		c.take(u, out)
		if u.GetSynced() != nil {
			c.forgetOthers(seen)
		}
	}
}

// forgetOthers removes workloads that the host no longer has.
func (c *testControl) forgetOthers(seen map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.resources {
		if strings.HasPrefix(key, "workload/") && !seen[key] {
			c.removeLocked(key)
		}
	}
}

func (c *testControl) take(u *api.HostUpdate, out chan *api.ControlUpdate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case u.GetWorkloadUp() != nil:
		w := u.GetWorkloadUp()
		if !c.covers(w.GetNamespace(), w.GetService()) {
			out <- &api.ControlUpdate{Update: &api.ControlUpdate_Refused{Refused: &api.Refused{WorkloadId: w.GetId(), Reason: "not covered", Remedy: "join with another token"}}}
			return
		}
		if c.pods {
			w.Artifacts = api.FromArtifacts(c.runs)
		}
		c.put(&api.Resource{Key: "workload/" + w.GetId(), Body: &api.Resource_Workload{Workload: w}})
		out <- &api.ControlUpdate{Update: &api.ControlUpdate_Accepted{Accepted: &api.Accepted{WorkloadId: w.GetId()}}}
	case u.GetWorkloadGone() != "":
		c.gone = append(c.gone, u.GetWorkloadGone())
		c.removeLocked("workload/" + u.GetWorkloadGone())
	case u.GetBundleAck() != nil:
		c.acks[u.GetBundleAck().GetWorkloadId()] = u.GetBundleAck().GetVersion()
	case u.GetReport() != nil:
		var r api.WorkloadReport
		err := proto.Unmarshal(u.GetReport(), &r)
		if err == nil {
			_, err = r.Noun()
		}
		if err != nil {
			c.invalid = append(c.invalid, err)
		}
		c.reports[api.ReportOf(u.GetReport())] = &r
	case u.GetFinding() != nil:
		if _, err := u.GetFinding().Noun(); err != nil {
			c.invalid = append(c.invalid, err)
		}
		c.findings = append(c.findings, u.GetFinding())
	}
}

// put publishes a resource; the caller holds mu.
func (c *testControl) put(r *api.Resource) {
	c.version++
	r.Version = c.version
	c.resources[r.GetKey()] = r
	c.publish(&api.Delta{Version: c.version, Complete: true, Upsert: []*api.Resource{r}})
}

func (c *testControl) removeLocked(key string) {
	c.version++
	delete(c.resources, key)
	c.publish(&api.Delta{Version: c.version, Complete: true, Remove: []string{key}})
}

func (c *testControl) publish(d *api.Delta) {
	for out := range c.streams {
		out <- &api.ControlUpdate{Update: &api.ControlUpdate_Delta{Delta: d}}
	}
}

func (c *testControl) service(s assay.Service) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(&api.Resource{Key: "service/" + s.Key(), Body: &api.Resource_Service{Service: api.FromService(&s)}})
}

// foundSoFar are the findings that it was told.
func (c *testControl) foundSoFar() []*api.Finding {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.findings)
}

func (c *testControl) namespace(n assay.NamespaceConfig) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(&api.Resource{Key: "namespace/" + n.Namespace, Body: &api.Resource_Namespace{Namespace: api.FromNamespaceConfig(&n)}})
}

func (c *testControl) Issue(ctx context.Context, r *api.IssueRequest) (*api.IssueResponse, error) {
	c.mu.Lock()
	c.requests++
	c.mu.Unlock()
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, api.ErrorStatus(&assay.Error{Kind: assay.Invalid, Op: "issue", Err: err})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.resources["workload/"+r.GetWorkloadId()] == nil {
		return nil, api.ErrorStatus(&assay.Error{Kind: assay.NotFound, Op: "issue", Err: errors.New("no such workload")})
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	if c.pods {
		if len(c.runs) == 0 {
			return nil, api.ErrorStatus(&assay.Error{Kind: assay.NotFound, Op: "issue", Err: errors.New("what it runs is not known yet")})
		}
		ext, err := assay.MarshalArtifactExtension(c.runs.Digest())
		if err != nil {
			return nil, err
		}
		tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, ext)
		r.Artifacts = api.FromArtifacts(c.runs)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.root, csr.PublicKey, c.key)
	if err != nil {
		return nil, err
	}
	c.issued[r.GetWorkloadId()] = r.GetArtifacts()
	return &api.IssueResponse{Chain: [][]byte{der}, RenewAt: api.FromTime(time.Now().Add(time.Hour / 2))}, nil
}

// run has a platform tell what a pod runs.
func (c *testControl) run(id string, digests ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.runs = nil
	for _, d := range digests {
		c.runs = append(c.runs, assay.Artifact{Kind: assay.Image, Digest: assay.Digest("sha256:" + strings.Repeat(d, 64)), Name: "image-" + d})
	}
	if r := c.resources["workload/"+id]; r != nil {
		w := proto.CloneOf(r.GetWorkload())
		w.Artifacts = api.FromArtifacts(c.runs)
		c.put(&api.Resource{Key: r.GetKey(), Body: &api.Resource_Workload{Workload: w}})
	}
}

// workload returns what control knows of the one workload whose ID begins so.
func (c *testControl) workload(prefix string) *api.Workload {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, r := range c.resources {
		if strings.HasPrefix(key, "workload/"+prefix) {
			return r.GetWorkload()
		}
	}
	return nil
}

func (c *testControl) certified(prefix string) []*api.Artifact {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, a := range maps.All(c.issued) {
		if strings.HasPrefix(id, prefix) {
			return a
		}
	}
	return nil
}
