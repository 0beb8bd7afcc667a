package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/api"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// RemoteConfig says how to reach control on another machine.
type RemoteConfig struct {
	Address  string // host:port
	DataDir  string // the agent's
	HostName string
	// Token is a join token; it is used when the host has no certificate, and only
	// then: a host that joined may be given the spent one again.
	Token string
	// Node is how a node of a cluster joins, in place of Token.
	Node *NodeJoin
	// Mark is the packet mark of connections to control, for an agent whose own packets its
	// rules would capture (DefaultOwnMark). 0: none.
	Mark uint32
	Log  *slog.Logger
	Now  func() time.Time // nil: time.Now
}

// Remote calls control as this host, over TLS, and renews the host's certificate. It
// is an api.HostsClient. What it knows is in DataDir/host: key.pem and host.json, 0600.
// The key is made there and never leaves.
type Remote struct {
	cfg  RemoteConfig
	look time.Duration // between looks at the clock
	conn atomic.Pointer[grpc.ClientConn]
	// doubts holds a token while an answer said that control does not know this host, or the
	// two do not take each other's certificates. Of a node alone: it can do something about it.
	doubts chan struct{}
	dialed atomic.Uint64 // connections so far; what calls of older ones say is about older certificates

	mu   sync.Mutex
	host hostCredentials
	pool *x509.CertPool
	cert *tls.Certificate
}

// hostCredentials is what control gave to this host.
type hostCredentials struct {
	HostID      string    `json:"hostID"`
	TrustDomain string    `json:"trustDomain"`
	Chain       [][]byte  `json:"chain"`
	Key         []byte    `json:"key"` // PKCS 8
	Roots       [][]byte  `json:"roots"`
	Bundle      uint64    `json:"bundle"`
	RenewAt     time.Time `json:"renewAt"`
}

// maxMessage fits the first delta of a large mesh.
const maxMessage = 64 << 20

// Connect joins the mesh if this host has not, and returns its client. It fails when
// the host cannot join; a control that is merely away does not matter to a host that
// has joined. With cfg.Node it is Run that joins.
func Connect(ctx context.Context, cfg RemoteConfig) (*Remote, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.HostName == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		cfg.HostName = name
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &Remote{cfg: cfg, look: renewalLook, doubts: make(chan struct{}, 1)}
	dir := filepath.Join(cfg.DataDir, "host")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, &assay.Error{Op: "open " + dir, Err: err, Remedy: "run as root, or name a folder of your own"}
	}
	err := readJSON(r.file(), &r.host)
	switch {
	case cfg.Node != nil:
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			cfg.Log.Warn("this host's certificate cannot be read; it joins anew", "err", err)
		}
		if err == nil {
			err = errors.Join(checkPrivate(r.file()), r.use(r.host))
		}
		if err != nil {
			return r, nil
		}
		return r, r.redial()
	case errors.Is(err, os.ErrNotExist):
		if err := r.join(ctx); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, &assay.Error{Op: "read this host's certificate", Err: err, Remedy: "restore the file, or remove it and join with a new token"}
	}
	if err := checkPrivate(r.file()); err != nil {
		return nil, err
	}
	if err := r.use(r.host); err != nil {
		return nil, &assay.Error{Op: "read this host's certificate", Err: err, Remedy: "remove " + r.file() + " and join with a new token"}
	}
	return r, r.redial()
}

func (r *Remote) file() string { return filepath.Join(r.cfg.DataDir, "host", "host.json") }

func checkPrivate(path string) error {
	st, err := os.Stat(path)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = &assay.Error{Kind: assay.Denied, Op: "read " + path, Err: fmt.Errorf("others may read it (%v)", st.Mode().Perm()), Remedy: "it holds this host's key: chmod 600, and if others could have read it, join with a new token"}
	}
	return err
}

// use makes c what connections are made with.
func (r *Remote) use(c hostCredentials) error {
	key, err := x509.ParsePKCS8PrivateKey(c.Key)
	if err != nil {
		return err
	}
	if len(c.Chain) == 0 {
		return errors.New("no certificate")
	}
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		return err
	}
	roots, err := api.FromBundle(c.Bundle, c.Roots).Certificates()
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.host, r.pool = c, pool
	r.cert = &tls.Certificate{Certificate: c.Chain, PrivateKey: key, Leaf: leaf}
	return nil
}

// admission is the token to join with, and the TLS in which control may see it.
func (r *Remote) admission(ctx context.Context) (string, *tls.Config, error) {
	op := "join " + r.cfg.Address
	if r.cfg.Node != nil {
		token, err := r.cfg.Node.Token()
		if err != nil {
			return "", nil, err
		}
		roots, err := r.cfg.Node.Roots(ctx)
		if err != nil {
			return "", nil, err
		}
		pool := x509.NewCertPool()
		for _, c := range roots {
			pool.AddCert(c)
		}
		return token, api.ClientTLS(api.Credentials{
			Roots:       func() *x509.CertPool { return pool },
			Certificate: func() (*tls.Certificate, error) { return &tls.Certificate{}, nil },
			Now:         r.cfg.Now,
		}), nil
	}
	if r.cfg.Token == "" {
		return "", nil, &assay.Error{Kind: assay.Denied, Op: op, Err: errors.New("this host has not joined a mesh yet"), Remedy: "make a token with: assay token create, and start the agent with it"}
	}
	token, err := assay.ParseJoinToken(r.cfg.Token)
	if err != nil {
		return "", nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
	}
	return r.cfg.Token, api.JoinTLS(token, r.cfg.Now), nil
}

// join spends the token. The key is on disk before it is certified, so a join whose
// answer was lost is repeated with the same one, which control takes.
func (r *Remote) join(ctx context.Context) error {
	op := "join " + r.cfg.Address
	token, secure, err := r.admission(ctx)
	if err != nil {
		return err
	}
	pending := filepath.Join(r.cfg.DataDir, "host", "join.key")
	raw, err := os.ReadFile(pending)
	if errors.Is(err, os.ErrNotExist) {
		if raw, err = newKey(); err == nil {
			err = writeFile(pending, raw, 0o600)
		}
	}
	if err != nil {
		return &assay.Error{Op: op, Err: err}
	}
	csr, err := request(raw)
	if err != nil {
		return &assay.Error{Op: op, Err: err}
	}
	conn, err := grpc.NewClient("passthrough:"+r.cfg.Address, r.options(secure)...)
	if err != nil {
		return &assay.Error{Op: op, Err: err}
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	answer, err := api.NewHostsClient(conn).Join(ctx, &api.JoinRequest{Token: token, Csr: csr, HostName: r.cfg.HostName}, grpc.WaitForReady(false))
	if err != nil {
		return api.StatusError(op, err)
	}
	if err := r.keep(answer, raw); err != nil {
		return &assay.Error{Op: op, Err: err}
	}
	r.cfg.Log.Info("joined", "host", answer.GetHostId(), "mesh", answer.GetTrustDomain())
	return os.Remove(pending)
}

// keep takes in a certificate for key, on disk first.
func (r *Remote) keep(answer *api.JoinResponse, key []byte) error {
	renew, err := api.Time(answer.GetRenewAt())
	if err != nil {
		return err
	}
	c := hostCredentials{
		HostID: answer.GetHostId(), TrustDomain: answer.GetTrustDomain(), Chain: answer.GetChain(), Key: key,
		Roots: answer.GetBundle().GetRoots(), Bundle: answer.GetBundle().GetVersion(), RenewAt: renew,
	}
	if err := r.use(c); err != nil {
		return err
	}
	return writeJSON(r.file(), c)
}

// Roots returns those that control has announced; nil before the host has joined.
func (r *Remote) Roots() []*x509.Certificate {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []*x509.Certificate
	for _, raw := range r.host.Roots {
		if c, err := x509.ParseCertificate(raw); err == nil {
			list = append(list, c)
		}
	}
	return list
}

// SetBundle takes in the roots that control announces, so that the next connection
// trusts them. It is Config.Bundle.
func (r *Remote) SetBundle(b *api.Bundle) error {
	r.mu.Lock()
	c := r.host
	r.mu.Unlock()
	if c.Bundle == b.GetVersion() {
		return nil
	}
	c.Roots, c.Bundle = b.GetRoots(), b.GetVersion()
	if err := r.use(c); err != nil {
		return err
	}
	return writeJSON(r.file(), c)
}

// renewalLook is how often the clock is looked at: a timer of days stands still with a
// machine that sleeps, and knows nothing of a clock that was set.
const renewalLook = time.Minute

// Run renews the certificate until ctx ends: with a fresh key, at the time that
// control names, and again soon when that fails.
func (r *Remote) Run(ctx context.Context) error {
	if r.cfg.Node != nil {
		if err := r.joinNode(ctx); err != nil {
			return nil // the end of ctx
		}
	}
	const first = time.Second
	retry := first
	for {
		wait := min(r.untilRenewal(), r.look)
		if retry > first {
			wait = max(wait, retry/2+mathrand.N(retry))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.doubts:
			if r.joinAnew(ctx) != nil {
				return nil
			}
			continue
		case <-time.After(wait):
		}
		if r.untilRenewal() > 0 {
			continue
		}
		if err := r.renew(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if r.cfg.Node != nil && !r.cfg.Now().Before(r.notAfter()) {
				r.cfg.Log.Warn("this host's certificate has ended; it joins anew", "until", r.notAfter(), "err", err)
				if r.joinNode(ctx) != nil {
					return nil
				}
				retry = first
				continue
			}
			r.cfg.Log.Error("this host's certificate was not renewed", "err", r.hopeless(err), "until", r.notAfter())
			retry = min(2*retry, time.Minute)
			continue
		}
		retry = first
	}
}

func (r *Remote) untilRenewal() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(r.host.RenewAt.Sub(r.cfg.Now()), 0)
}

// hopeless says what to do when the certificate has ended: control takes it no more.
func (r *Remote) hopeless(err error) error {
	if end := r.notAfter(); !r.cfg.Now().Before(end) {
		return &assay.Error{Kind: assay.Denied, Op: "renew", Err: fmt.Errorf("it ended at %s: %w", end.Format(time.RFC3339), err),
			Remedy: "see that this host's clock is right; if it is, stop the agent, remove " + r.file() + " and join with a new token"}
	}
	return err
}

func (r *Remote) notAfter() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cert.Leaf.NotAfter
}

func (r *Remote) renew(ctx context.Context) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	csr, err := request(key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	answer, err := r.Renew(ctx, &api.RenewRequest{Csr: csr})
	if err != nil {
		return api.StatusError("renew", err)
	}
	if err := r.keep(answer, key); err != nil {
		return err
	}
	// Control ends what an old certificate opened; a new connection comes first.
	return r.redial()
}

// redial makes a connection with the newest certificate and closes the one before.
func (r *Remote) redial() error {
	r.mu.Lock()
	domain := r.host.TrustDomain
	r.mu.Unlock()
	number := r.dialed.Add(1)
	select {
	case <-r.doubts:
	default:
	}
	conn, err := grpc.NewClient("passthrough:"+r.cfg.Address, r.options(api.ClientTLS(api.Credentials{
		TrustDomain: domain,
		Roots: func() *x509.CertPool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.pool
		},
		Certificate: func() (*tls.Certificate, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.cert, nil
		},
		Now: r.cfg.Now,
	}), r.observers(number)...)...)
	if err != nil {
		return err
	}
	if old := r.conn.Swap(conn); old != nil {
		old.Close()
	}
	return nil
}

func (r *Remote) options(t *tls.Config, more ...grpc.DialOption) []grpc.DialOption {
	if r.cfg.Mark != 0 {
		more = append(more, grpc.WithContextDialer(r.dialMarked))
	}
	return append([]grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(t)),
		// The library's own patience grows to two minutes: a host would hear that late
		// of a control that is back.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryFirst, Multiplier: 1.6, Jitter: 0.2, MaxDelay: retryMost / 2},
			MinConnectTimeout: retryMost,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	}, more...)
}

func (r *Remote) dialMarked(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) {
			failed = os.NewSyscallError("setsockopt SO_MARK", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(r.cfg.Mark)))
		})
		return errors.Join(err, failed)
	}}
	return d.DialContext(ctx, "tcp", address)
}

// Close ends the connection.
func (r *Remote) Close() error {
	if conn := r.conn.Load(); conn != nil {
		return conn.Close()
	}
	return nil
}

// The methods of api.HostsClient call through the newest connection.

func (r *Remote) Join(ctx context.Context, in *api.JoinRequest, opts ...grpc.CallOption) (*api.JoinResponse, error) {
	c, err := r.client()
	if err != nil {
		return nil, err
	}
	return c.Join(ctx, in, opts...)
}

func (r *Remote) Renew(ctx context.Context, in *api.RenewRequest, opts ...grpc.CallOption) (*api.JoinResponse, error) {
	c, err := r.client()
	if err != nil {
		return nil, err
	}
	return c.Renew(ctx, in, opts...)
}

func (r *Remote) Sync(ctx context.Context, opts ...grpc.CallOption) (grpc.BidiStreamingClient[api.HostUpdate, api.ControlUpdate], error) {
	c, err := r.client()
	if err != nil {
		return nil, err
	}
	return c.Sync(ctx, opts...)
}

func (r *Remote) Issue(ctx context.Context, in *api.IssueRequest, opts ...grpc.CallOption) (*api.IssueResponse, error) {
	c, err := r.client()
	if err != nil {
		return nil, err
	}
	return c.Issue(ctx, in, opts...)
}

// client is the client of the newest connection.
func (r *Remote) client() (api.HostsClient, error) {
	if conn := r.conn.Load(); conn != nil {
		return api.NewHostsClient(conn), nil
	}
	return nil, status.Error(codes.Unavailable, "this node has not joined the mesh yet")
}

func newKey() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKCS8PrivateKey(key)
}

func request(key []byte) ([]byte, error) {
	k, err := x509.ParsePKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
}
