package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is a control with its listeners, as `assay control` has them.
type running struct {
	*Control
	t      *testing.T
	cfg    Config
	remote net.Addr
	socket string
	cancel context.CancelFunc
	done   sync.WaitGroup
	once   sync.Once
}

// start opens and runs a control; the test's end stops it.
func start(t *testing.T, change func(*Config)) *running {
	t.Helper()
	return startAt(t, "127.0.0.1:0", change)
}

// startAt does so with the address for hosts.
func startAt(t *testing.T, address string, change func(*Config)) *running {
	t.Helper()
	cfg := Config{Data: filepath.Join(t.TempDir(), "data"), TrustDomain: "bank.test", Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if change != nil {
		change(&cfg)
	}
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.model.hold = time.Millisecond // most tests look at a stream that has said nothing
	r := &running{Control: c, t: t, cfg: cfg}
	remote, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	r.remote = remote.Addr()
	r.socket = filepath.Join(t.TempDir(), "control.sock")
	local, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	for _, f := range []func(context.Context) error{
		c.Run,
		func(ctx context.Context) error { return c.ServeRemote(ctx, remote) },
		func(ctx context.Context) error { return c.ServeOperators(ctx, local) },
	} {
		r.done.Go(func() {
			if err := f(ctx); err != nil {
				t.Errorf("%v", err)
			}
		})
	}
	t.Cleanup(r.stop)
	return r
}

// stop ends it as SIGTERM does.
func (r *running) stop() {
	r.once.Do(func() {
		r.cancel()
		r.done.Wait()
		if err := r.Close(); err != nil {
			r.t.Errorf("close: %v", err)
		}
	})
}

// restart stops it and starts another on the same folder.
func (r *running) restart(change func(*Config)) *running {
	r.t.Helper()
	r.stop()
	return start(r.t, func(cfg *Config) {
		*cfg = r.cfg
		if change != nil {
			change(cfg)
		}
	})
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		if f() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // a look every 5 ms, not a wait for luck
	}
}

func (r *running) operator(t *testing.T) api.OperatorClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return api.NewOperatorClient(conn)
}

// list reads documents as people do.
func documents[T any](t *testing.T, o api.OperatorClient, kind string) []T {
	t.Helper()
	resp, err := o.List(t.Context(), &api.ListRequest{Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	out := make([]T, len(resp.Items))
	for i, raw := range resp.Items {
		if err := json.Unmarshal(raw, &out[i]); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// remoteHost is a machine that has joined: what an agent keeps.
type remoteHost struct {
	id     string
	cert   tls.Certificate
	bundle *api.Bundle
	hosts  api.HostsClient
	conn   *grpc.ClientConn
}

func (r *running) token(t *testing.T, covers ...string) assay.JoinToken {
	t.Helper()
	resp, err := r.operator(t).CreateToken(t.Context(), &api.CreateTokenRequest{Covers: covers, TtlSeconds: 3600})
	if err != nil {
		t.Fatal(err)
	}
	token, err := assay.ParseJoinToken(resp.Token)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func (r *running) dial(t *testing.T, cfg *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(r.remote.String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (r *running) tryJoin(t *testing.T, token assay.JoinToken, key *ecdsa.PrivateKey, name string) (*remoteHost, error) {
	t.Helper()
	conn := r.dial(t, api.JoinTLS(token, time.Now))
	resp, err := api.NewHostsClient(conn).Join(t.Context(), &api.JoinRequest{Token: token.String(), Csr: csr(t, key), HostName: name})
	if err != nil {
		return nil, err
	}
	h := &remoteHost{id: resp.HostId, bundle: resp.Bundle, cert: tls.Certificate{Certificate: resp.Chain, PrivateKey: key}}
	h.connect(t, r)
	return h, nil
}

// connect dials with the host's certificate.
func (h *remoteHost) connect(t *testing.T, r *running) {
	t.Helper()
	h.conn = r.dial(t, api.ClientTLS(api.Credentials{TrustDomain: r.TrustDomain(), Roots: h.pool(t),
		Certificate: func() (*tls.Certificate, error) { return &h.cert, nil }}))
	h.hosts = api.NewHostsClient(h.conn)
}

func (h *remoteHost) pool(t *testing.T) func() *x509.CertPool {
	t.Helper()
	roots, err := h.bundle.Certificates()
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	return func() *x509.CertPool { return pool }
}

func (r *running) join(t *testing.T, name string, covers ...string) *remoteHost {
	t.Helper()
	h, err := r.tryJoin(t, r.token(t, covers...), newKey(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// agent is the host's side of a Sync stream: it keeps what control sends.
type agent struct {
	t       *testing.T
	stream  grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate]
	cancel  context.CancelFunc
	welcome *api.Welcome

	mu        sync.Mutex
	resources map[string]*api.Resource
	version   uint64
	revision  int64
	complete  int      // deltas that were whole
	first     []string // keys after the first of them
	messages  int
	upserts   int
	accepted  map[string]int
	refused   map[string]*api.Refused
	bundle    *api.Bundle
	err       error
	ended     sync.WaitGroup
}

// sync opens a stream, resuming from what before had (nil: nothing).
func syncHost(t *testing.T, hosts api.HostsClient, before *agent) *agent {
	t.Helper()
	a := dialSync(t, hosts, before)
	a.ended.Go(a.read)
	eventually(t, "the first snapshot", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.complete > 0 || a.err != nil })
	return a
}

func dialSync(t *testing.T, hosts api.HostsClient, before *agent) *agent {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	a := &agent{t: t, cancel: cancel, resources: map[string]*api.Resource{}, accepted: map[string]int{}, refused: map[string]*api.Refused{}}
	t.Cleanup(a.close)
	hello := &api.HostHello{Build: "test", HostName: "node"}
	if before != nil {
		before.mu.Lock()
		defer before.mu.Unlock()
		hello.Revision = before.revision
		hello.Epoch, hello.Known = before.welcome.GetEpoch(), map[string]uint64{}
		for k, r := range before.resources {
			a.resources[k] = r
			hello.Known[k] = r.Version
		}
	}
	var err error
	if a.stream, err = hosts.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: hello}})
	first, err := a.stream.Recv()
	if err != nil {
		a.err = err
		return a
	}
	a.welcome = first.GetWelcome()
	return a
}

func (a *agent) close() {
	a.cancel()
	a.ended.Wait()
}

func (a *agent) send(u *api.HostUpdate) {
	a.t.Helper()
	if err := a.stream.Send(u); err != nil {
		a.t.Logf("send: %v", err)
	}
}

func (a *agent) read() {
	if a.err != nil {
		return
	}
	for {
		u, err := a.stream.Recv()
		a.mu.Lock()
		if err != nil {
			a.err = err
			a.mu.Unlock()
			return
		}
		a.messages++
		switch u := u.Update.(type) {
		case *api.ControlUpdate_Delta:
			for _, k := range u.Delta.Remove {
				delete(a.resources, k)
			}
			for _, r := range u.Delta.Upsert {
				a.resources[r.Key] = r
				a.upserts++
			}
			a.version, a.revision = u.Delta.Version, u.Delta.Revision
			if u.Delta.Complete {
				if a.complete++; a.complete == 1 {
					a.first = slices.Sorted(maps.Keys(a.resources))
				}
			}
		case *api.ControlUpdate_Bundle:
			a.bundle = u.Bundle
		case *api.ControlUpdate_Accepted:
			a.accepted[u.Accepted.WorkloadId]++
		case *api.ControlUpdate_Refused:
			a.refused[u.Refused.WorkloadId] = u.Refused
		}
		a.mu.Unlock()
	}
}

func (a *agent) up(w *assay.Workload) {
	a.send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: api.FromWorkload(w)}})
}
func (a *agent) gone(id string) {
	a.send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadGone{WorkloadGone: id}})
}
func (a *agent) released(id string) {
	a.send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadReleased{WorkloadReleased: id}})
	a.gone(id)
}
func (a *agent) synced() {
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Synced{Synced: &api.Synced{}}})
}
func (a *agent) ack(workload string, version uint64) {
	a.send(&api.HostUpdate{Update: &api.HostUpdate_BundleAck{BundleAck: &api.BundleAck{WorkloadId: workload, Version: version}}})
}

// keys lists what the host knows.
func (a *agent) keys() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for k := range a.resources {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (a *agent) get(key string) *api.Resource {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.resources[key]
}

func (a *agent) waitFor(key string) *api.Resource {
	a.t.Helper()
	eventually(a.t, "resource "+key, func() bool { return a.get(key) != nil })
	return a.get(key)
}

func (a *agent) waitAccepted(id string) {
	a.t.Helper()
	eventually(a.t, "workload "+id+" accepted", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.refused[id] != nil {
			a.t.Fatalf("refused: %v", a.refused[id])
		}
		return a.accepted[id] > 0
	})
}

func (a *agent) waitRefused(id string) *api.Refused {
	a.t.Helper()
	var r *api.Refused
	eventually(a.t, "workload "+id+" refused", func() bool { a.mu.Lock(); defer a.mu.Unlock(); r = a.refused[id]; return r != nil })
	return r
}

// waitEnd waits for the stream to end and returns why.
func (a *agent) waitEnd() error {
	a.t.Helper()
	eventually(a.t, "the end of the stream", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.err != nil })
	return api.StatusError("sync", a.err)
}

// workload makes the n-th workload of the host whose stream a is.
func (a *agent) workload(id, ns, service string, n byte, ports ...uint16) *assay.Workload {
	a.t.Helper()
	var addrs []netip.Addr
	for _, s := range a.welcome.GetPrefixes() {
		addrs = append(addrs, add(netip.MustParsePrefix(s).Addr(), uint64(n)+1))
	}
	name := service
	if name == "" {
		name = "client"
	}
	return &assay.Workload{ID: id, Namespace: ns, Name: name, Service: service, Host: a.welcome.GetHostId(),
		Identity: assay.Identity{TrustDomain: a.welcome.GetTrustDomain(), Namespace: ns, Account: name}, Addrs: addrs,
		Ports: ports, Listening: ports, Artifacts: artifacts(id), MeshedSince: time.Now().UTC().Truncate(time.Microsecond)}
}

func artifacts(of string) assay.ArtifactSet {
	return assay.ArtifactSet{{Kind: assay.Executable, Name: "/usr/bin/" + of, Digest: assay.DigestOf([]byte(of))}}
}

// issue asks for a certificate as an agent does for its proxy.
func issue(t *testing.T, hosts api.HostsClient, workload string) ([]*x509.Certificate, error) {
	t.Helper()
	resp, err := hosts.Issue(t.Context(), &api.IssueRequest{WorkloadId: workload, Csr: csr(t, newKey(t)), Artifacts: api.FromArtifacts(artifacts(workload))})
	if err != nil {
		return nil, api.StatusError("issue", err)
	}
	if resp.Refused != "" {
		return nil, &assay.Error{Kind: assay.Denied, Op: "issue", Err: errors.New(resp.Refused), Remedy: resp.Remedy}
	}
	var chain []*x509.Certificate
	for _, der := range resp.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	return chain, nil
}

func localHosts(t *testing.T, r *running) api.HostsClient {
	t.Helper()
	hosts, err := r.LocalHost(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return hosts
}

func show(v any) string { b, _ := json.Marshal(v); return fmt.Sprint(string(b)) }

// clock is a time that tests move; it begins now and stands still.
type clock struct{ ns atomic.Int64 }

func newClock() *clock { c := &clock{}; c.ns.Store(time.Now().UnixNano()); return c }

func (c *clock) now() time.Time          { return time.Unix(0, c.ns.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }
