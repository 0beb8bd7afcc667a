package control

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
	"assay.dev/identity"
	"assay.dev/store"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
)

// Config says what control to run.
type Config struct {
	Data        string              // folder for the lock, the authority and the embedded store; made when it is not there
	Store       string              // URL, see package store; "": an embedded one in Data
	TrustDomain string              // of a new mesh ("": assay.local); of an old one the same, or empty
	Network     Network             // zero: DefaultNetwork, and none in a cluster
	Intent      string              // folder of intent that is watched; "" for none
	Translate   discovery.Translate // reads intent; nil: Apply is refused
	// Cluster makes nodes of a platform the hosts of this mesh; nil: they join with tokens.
	// Whoever watches the platform tells Follow; intent is what it says.
	Cluster *Cluster
	// Names are DNS names in control's own certificate, for those who ask it over HTTPS (WebTLS).
	Names []string
	// Authority, if not nil, has the authority's keys in the store, sealed under these, and not
	// in Data; what is in Data is taken over. On a store that several can reach it makes this
	// control one of several that serve at the same time.
	Authority *identity.SealingKeys
	// Advertise is HOST:PORT where the other controls reach this one; "": they do not, and
	// show people what it knows of its own hosts' traffic alone.
	Advertise string
	// Lease is how long the workloads of a host whose stream is down stay ready. 0
	// means 30 s.
	Lease time.Duration
	// Viewers is the ID of a group whose members may look through the operators'
	// socket; 0 for none.
	Viewers int
	// Certificates is how long those of the authority live; zero: identity's default.
	Certificates identity.Policy
	// LeafLife is how long workloads' certificates live; zero: identity's default.
	LeafLife time.Duration
	// KeepEnded is how long the inventory keeps certificates that have ended, an hour at least;
	// zero: DefaultKeepEnded.
	KeepEnded time.Duration
	Log       *slog.Logger     // nil: none
	Now       func() time.Time // nil: time.Now

	takeover time.Duration // see the constant; 0: that
}

// Control is an open control. It does its work in Run and in the Serve methods.
type Control struct {
	api.UnimplementedHostsServer
	api.UnimplementedOperatorServer
	api.UnimplementedReplicasServer

	cfg         Config
	log         *slog.Logger
	now         func() time.Time
	lock        *os.File
	store       *store.DB
	authority   *identity.Authority
	model       *model
	behind      *behind
	intent      intent
	folder      string // signature of the folder of intent that was applied last; Open's, then watch's
	certificate atomic.Pointer[tls.Certificate]
	renewing    sync.Mutex
	renewAt     time.Time // of certificate; guarded by renewing
	rotateSoon  chan struct{}
	refused     refusedCertificates
	refusing    sync.Mutex     // held while refused changes
	taken       atomic.Bool    // another control has the store
	several     *several       // nil: there is one control on the store
	told        string         // of this mesh's roots, to the store; Open's, then showLife's
	streams     sync.WaitGroup // receivers of Sync streams
	nobodies    nobodies
	joining     atomic.Int32

	localOnce sync.Once
	local     *bufconn.Listener
	localConn *grpc.ClientConn
	localErr  error
}

// localHost is the ID of the host in control's own process.
const localHost = "local"

// Open takes the data folder for itself, opens store and authority and loads
// everything. The caller calls Close, after Run and all Serve methods have
// returned.
func Open(ctx context.Context, cfg Config) (_ *Control, err error) {
	if cfg.Network == (Network{}) && cfg.Cluster == nil {
		cfg.Network = DefaultNetwork
	}
	if cfg.Lease == 0 {
		cfg.Lease = 30 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.KeepEnded == 0 {
		cfg.KeepEnded = DefaultKeepEnded
	}
	if cfg.takeover == 0 {
		cfg.takeover = takeover
	}
	if cfg.Store == "" {
		cfg.Store = "sqlite:" + filepath.Join(cfg.Data, "state.db")
	}
	if err := cfg.Network.validate(); err != nil {
		return nil, err
	}
	if cfg.KeepEnded < leastKeepEnded {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "open control", Err: fmt.Errorf("ended certificates would be kept for %v only", cfg.KeepEnded),
			Remedy: fmt.Sprintf("keep them for %v at least: clocks differ", leastKeepEnded)}
	}
	c := &Control{cfg: cfg, log: cfg.Log, now: cfg.Now, rotateSoon: make(chan struct{}, 1), local: bufconn.Listen(256 << 10)}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.lock, err = lockFolder(cfg.Data); err != nil {
		return nil, err
	}
	if c.store, err = store.Open(ctx, cfg.Store); err != nil {
		return nil, err
	}
	if err := c.claim(ctx); err != nil {
		return nil, err
	}
	if err := c.openAuthority(ctx); err != nil {
		return nil, err
	}
	if err := c.sameMesh(ctx); err != nil {
		return nil, err
	}
	if cfg.Authority != nil && c.store.Shared() {
		if err := c.beOneOfSeveral(ctx); err != nil {
			return nil, err
		}
	}
	c.behind = newBehind(c.store, c.log)
	c.behind.several = c.several != nil
	if err := c.load(ctx); err != nil {
		return nil, err
	}
	if err := c.rotate(identity.Tick{}); err != nil {
		return nil, err
	}
	if cfg.Intent != "" {
		c.followFolder(ctx, cfg.Intent)
	}
	return c, nil
}

// lockFolder makes this process the one control of a data folder. The lock ends
// with the process, however it ends.
func lockFolder(dir string) (*os.File, error) {
	op := "open the data folder " + dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "choose another with --data"}
	}
	f, err := os.OpenFile(filepath.Join(dir, "control.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "choose another with --data"}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("process %s is the control of it", strings.TrimSpace(string(holder[:n]))),
				Remedy: "stop that one first, or choose another folder with --data"}
		}
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	return f, nil
}

// load reads the whole state into memory. Versions of resources start anew, under
// a new epoch.
func (c *Control) load(ctx context.Context) error {
	epoch, err := c.nextEpoch(ctx)
	if err != nil {
		return err
	}
	heard, err := c.store.Revision(ctx) // what changes from here on is heard
	if err != nil {
		return err
	}
	m := newModel(c.authority.TrustDomain(), c.cfg.Network, epoch, c.cfg.Lease, c.now, c.behind)
	c.model = m
	if c.several != nil {
		m.me, m.revision, c.several.revision = c.several.id, heard, heard
		began := time.Now()
		defer func() { m.heard = began }()
		c.behind.attached, c.behind.rejected = m.attached, m.rejected
	}
	if c.cfg.Cluster != nil {
		m.cluster = newClusterView()
	}
	c.behind.numbered, c.behind.released, c.behind.services = m.allocated, m.released, c.cfg.Network.services()
	now := c.now()
	hosts, err := c.store.ListHosts(ctx)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		h.Ready = false
		m.setHost(h)
	}
	if m.vips, err = c.store.ListVIPs(ctx); err != nil {
		return err
	}
	workloads, err := c.store.ListWorkloads(ctx, "")
	if err != nil {
		return err
	}
	for i := range workloads {
		c.loadWorkload(&workloads[i])
	}
	if m.cluster != nil {
		claims, err := c.store.ListClaims(ctx)
		if err != nil {
			return err
		}
		for pod, host := range claims {
			m.cluster.claims[pod] = claim{host: host, stored: true}
			m.catalog.SetClaimed(pod, true)
		}
	}
	idle := map[string]idleService{}
	raw, err := c.store.GetMeta(ctx, metaIdle)
	if err == nil {
		err = json.Unmarshal(raw, &idle)
	}
	if err != nil && assay.KindOf(err) != assay.NotFound {
		return err
	}
	for key, s := range idle {
		m.catalog.Remember(key, s.Ports)
		m.idle[key] = s.Since
	}
	certs, err := c.store.ListCertificates(ctx, "", now)
	if err != nil {
		return err
	}
	for _, cert := range certs {
		m.issuedLocked(cert)
	}
	tokens, err := c.store.ListTokens(ctx)
	if err != nil {
		return err
	}
	for _, t := range tokens {
		m.tokens[t.ID] = t
	}
	if m.findings, err = newestLast(c.store.ListFindings(ctx, keptFindings)); err != nil {
		return err
	}
	if m.audit, err = newestLast(c.store.ListAudit(ctx, "", keptAudit)); err != nil {
		return err
	}
	if err := c.loadRefused(ctx); err != nil {
		return err
	}
	if err := c.loadIntent(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.publish()
	for key := range m.vips {
		if !m.snapshot.has("service/" + key) {
			m.number(key, false)
		}
	}
	return nil
}

// loadWorkload takes a workload as it was last known, unless another has its
// address, which the store cannot exclude.
func (c *Control) loadWorkload(w *assay.Workload) {
	for _, a := range w.Addrs {
		if owner, taken := c.model.owner[a]; taken || c.model.hosts[w.Host] == nil {
			c.log.Warn("a stored workload is left out", "workload", w.ID, "host", w.Host, "address", a, "owner", owner)
			if c.several == nil {
				c.behind.gone(w.ID, "")
			}
			return
		}
	}
	if !c.model.named(w) {
		c.log.Error("a stored workload is left out: no control stores another identity than its own", "workload", w.ID, "host", w.Host, "identity", w.Identity)
		return
	}
	c.model.setWorkload(w)
}

func newestLast[T any](list []T, err error) ([]T, error) {
	for i, j := 0, len(list)-1; i < j; i, j = i+1, j-1 {
		list[i], list[j] = list[j], list[i]
	}
	return list, err
}

// nextEpoch counts the starts of control.
func (c *Control) nextEpoch(ctx context.Context) (uint64, error) {
	for {
		raw, err := c.store.GetMeta(ctx, metaEpoch)
		if err != nil && assay.KindOf(err) != assay.NotFound {
			return 0, err
		}
		epoch := uint64(1)
		if len(raw) == 8 {
			epoch = binary.BigEndian.Uint64(raw) + 1
		}
		swapped, err := c.store.CompareAndSetMeta(ctx, metaEpoch, raw, binary.BigEndian.AppendUint64(nil, epoch))
		if err != nil || swapped {
			return epoch, err
		}
	}
}

// TrustDomain returns the mesh's trust domain.
func (c *Control) TrustDomain() string { return c.authority.TrustDomain() }

// Run does everything that is not an answer to somebody, until ctx ends.
func (c *Control) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.behind.run(ctx) })
	group.Go(func() error { return c.model.publisher(ctx) })
	group.Go(func() error { return c.tick(ctx) })
	group.Go(func() error { return c.rotations(ctx) })
	group.Go(func() error { return c.forgetEnded(ctx) })
	if c.several != nil {
		group.Go(func() error { return c.hear(ctx) })
		group.Go(func() error { return c.live(ctx) })
	} else {
		group.Go(func() error { return c.showLife(ctx) })
	}
	if c.cfg.Intent != "" {
		group.Go(func() error { return c.watch(ctx, c.cfg.Intent) })
	}
	if c.cfg.Cluster != nil {
		group.Go(func() error { return c.forgetNodes(ctx) })
		group.Go(func() error { return c.lookForStrays(ctx) })
	}
	group.Go(func() error {
		server := c.server(localPeer{localHost})
		api.RegisterHostsServer(server, c)
		return c.serve(ctx, server, c.local)
	})
	return group.Wait()
}

// tick does once a second what follows from time.
func (c *Control) tick(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			c.model.tick()
		}
	}
}

// rotations does so with certificates. It is on its own because it may wait for the store.
func (c *Control) rotations(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-c.rotateSoon:
		}
		c.acknowledge(ctx)
		var e identity.Event = identity.Tick{}
		if c.authority.Waiting() {
			e = identity.Acknowledged{Least: c.model.leastAcknowledged(c.authority.State())}
		}
		if err := c.rotate(e); err != nil && ctx.Err() == nil {
			c.log.Error("rotation", "err", err)
		}
	}
}

// LocalHost returns how the agent in control's own process calls it: without a
// network, as the host "local", which may run everything. It works while Run does.
func (c *Control) LocalHost(ctx context.Context) (api.HostsClient, error) {
	if _, ok := c.model.host(localHost); !ok {
		number, err := c.store.AllocatePrefix(ctx, localHost, c.cfg.Network.hosts())
		if err != nil {
			return nil, err
		}
		prefixes, err := c.cfg.Network.hostPrefixes(number)
		if err != nil {
			return nil, &assay.Error{Kind: assay.Unavailable, Op: "make the local host", Err: err}
		}
		name, err := os.Hostname()
		if err != nil {
			name = localHost
		}
		h := store.Host{Host: assay.Host{ID: localHost, Name: name, Prefixes: prefixes, Covers: []string{"*/*"}}, Joined: c.now()}
		if err := c.store.PutHost(ctx, h); err != nil {
			return nil, err
		}
		c.model.setHost(h)
	}
	c.localOnce.Do(func() {
		c.localConn, c.localErr = grpc.NewClient("passthrough:control",
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.local.DialContext(ctx) }),
			grpc.WithTransportCredentials(localPeer{}), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	})
	if c.localErr != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: "make the local host", Err: c.localErr}
	}
	return api.NewHostsClient(c.localConn), nil
}

// ServeRemote serves hosts and operators of other machines, over TLS with
// certificates of the mesh, until ctx ends. It closes the listener.
func (c *Control) ServeRemote(ctx context.Context, l net.Listener) error {
	if c.several != nil {
		return c.serveWhileWell(ctx, l, c.serveRemote)
	}
	return c.serveRemote(ctx, l)
}

func (c *Control) serveRemote(ctx context.Context, l net.Listener) error {
	server := c.server(newStrangers(credentials.NewTLS(c.serverTLS())))
	api.RegisterHostsServer(server, c)
	api.RegisterOperatorServer(server, c)
	api.RegisterReplicasServer(server, c)
	return c.serve(ctx, server, l)
}

// ServeOperators serves the people of this machine over a unix socket, until ctx
// ends. It closes the listener.
func (c *Control) ServeOperators(ctx context.Context, l net.Listener) error {
	viewers := c.cfg.Viewers
	if viewers == 0 {
		viewers = -1
	}
	server := c.server(unixPeer{viewers})
	api.RegisterOperatorServer(server, c)
	return c.serve(ctx, server, l)
}

// maxMessage bounds a message: what a host kept of a large mesh fits into a hello.
const maxMessage = 16 << 20

func (c *Control) server(creds credentials.TransportCredentials) *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(creds),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.InTapHandle(c.tap),
		grpc.UnaryInterceptor(c.unary),
		grpc.StreamInterceptor(c.stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(1000),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
}

// drain is how long calls under way may take when control stops. Streams do not
// end by themselves, so they are cut then.
const drain = 500 * time.Millisecond

func (c *Control) serve(ctx context.Context, server *grpc.Server, l net.Listener) error {
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case err := <-done:
		return &assay.Error{Kind: assay.Internal, Op: "serve " + l.Addr().String(), Err: err}
	case <-ctx.Done():
	}
	cut := time.AfterFunc(drain, server.Stop)
	server.GracefulStop()
	cut.Stop()
	<-done
	return nil
}

// Close gives everything up. It comes after Run and all Serve methods.
func (c *Control) Close() error {
	c.streams.Wait()
	var errs []error
	if c.localConn != nil {
		errs = append(errs, c.localConn.Close())
	}
	errs = append(errs, c.local.Close())
	if c.authority != nil {
		errs = append(errs, c.authority.Close())
	}
	if c.behind != nil && !c.taken.Load() {
		// What came in after Run had ended, while calls under way came to theirs.
		errs = append(errs, c.behind.flush(context.Background()))
	}
	if c.several != nil {
		errs = append(errs, c.end())
	}
	if c.store != nil {
		errs = append(errs, c.giveUp(), c.store.Close())
	}
	if c.lock != nil {
		errs = append(errs, c.lock.Close())
	}
	return errors.Join(errs...)
}
