package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"sync"
	"time"

	"assay.dev"
)

// Config says what authority to open.
type Config struct {
	Dir         string        // holds keys and state; made when it is not there
	TrustDomain string        // of a new mesh; of an old one it must be the same, or empty
	Policy      Policy        // zero: DefaultPolicy
	LeafLife    time.Duration // of workloads' certificates; zero: WorkloadLife
	Now         func() time.Time
}

// Authority signs certificates. It is safe for concurrent use.
type Authority struct {
	trustDomain string
	policy      Policy
	leafLife    time.Duration
	now         func() time.Time
	folder      *folder

	mu    sync.RWMutex
	state State
	dirty bool // the state on disk is older in what may wait (Root.Leaves)
	pairs map[string]*pair
}

// Bundle is the trust bundle: roots in DER under a version.
type Bundle struct {
	Version uint64
	Roots   [][]byte
}

// saved is the state file.
type saved struct {
	TrustDomain string `json:"trustDomain"`
	State       State  `json:"state"`
}

const stateFile = "state.json"

// Open opens the authority in cfg.Dir, or makes a new one there. The caller makes
// sure that no other process has it open, and closes it.
func Open(cfg Config) (*Authority, error) {
	if cfg.Policy == (Policy{}) {
		cfg.Policy = DefaultPolicy
	}
	if cfg.LeafLife <= 0 {
		cfg.LeafLife = WorkloadLife
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	f, err := openFolder(cfg.Dir)
	if err != nil {
		return nil, err
	}
	a := &Authority{trustDomain: cfg.TrustDomain, policy: cfg.Policy, leafLife: cfg.LeafLife, now: cfg.Now, folder: f, pairs: map[string]*pair{}}
	if err := a.load(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	if _, err := a.Step(Tick{}); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return a, nil
}

func (a *Authority) load() error {
	op := "open the authority in " + a.folder.path
	b, err := a.folder.read(stateFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !assay.ValidTrustDomain(a.trustDomain) {
			return &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("trust domain %q: may hold a-z, 0-9, '.', '-' and '_'", a.trustDomain)}
		}
		return nil
	case err != nil:
		if _, ok := errors.AsType[*assay.Error](err); ok {
			return err
		}
		return &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return &assay.Error{Kind: assay.Internal, Op: op, Err: fmt.Errorf("%s: %w", stateFile, err), Remedy: "put the folder back from its backup"}
	}
	if a.trustDomain != "" && a.trustDomain != s.TrustDomain {
		return &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("it is the authority of %s, not of %s", s.TrustDomain, a.trustDomain),
			Remedy: "a mesh keeps its trust domain; for another one use another data folder"}
	}
	a.trustDomain, a.state = s.TrustDomain, s.State
	keep := map[string]bool{}
	for _, id := range a.state.ids() {
		p, err := a.folder.readPair(id)
		if err != nil {
			return err
		}
		a.pairs[id] = p
		keep[id+".key"], keep[id+".crt"] = true, true
	}
	if err := a.folder.sweep(keep); err != nil {
		return &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	return nil
}

// ids lists the key pairs in use.
func (s *State) ids() []string {
	var out []string
	for _, r := range s.Roots {
		out = append(out, r.ID)
	}
	for _, im := range []Intermediate{s.Workload, s.Infrastructure} {
		if im.ID != "" {
			out = append(out, im.ID)
		}
	}
	return out
}

// Close stores what may have waited.
func (a *Authority) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var err error
	if a.dirty {
		err = a.save(a.state)
	}
	return errors.Join(err, a.folder.close())
}

// TrustDomain returns the mesh's trust domain.
func (a *Authority) TrustDomain() string { return a.trustDomain }

// State returns what rotation knows.
func (a *Authority) State() State {
	a.mu.RLock()
	defer a.mu.RUnlock()
	s := a.state
	s.Roots = append([]Root(nil), s.Roots...)
	return s
}

// Waiting reports whether a root waits to be acknowledged.
func (a *Authority) Waiting() bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, r := range a.state.Roots {
		if r.Phase == Published {
			return true
		}
	}
	return false
}

// Bundle returns the trust bundle.
func (a *Authority) Bundle() Bundle {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.bundle()
}

func (a *Authority) bundle() Bundle {
	b := Bundle{Version: a.state.Bundle}
	for _, r := range a.state.Roots {
		b.Roots = append(b.Roots, a.pairs[r.ID].cert.Raw)
	}
	return b
}

// Pool returns the bundle's roots for verification.
func (a *Authority) Pool() *x509.CertPool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	pool := x509.NewCertPool()
	for _, r := range a.state.Roots {
		pool.AddCert(a.pairs[r.ID].cert)
	}
	return pool
}

// SigningRoot returns the root that signs now, in DER: what join tokens pin.
func (a *Authority) SigningRoot() []byte {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.pairs[a.state.Infrastructure.Root].cert.Raw
}

// Line is one certificate of the authority's own.
type Line struct {
	ID          string // "root-1", "workload-2", "infrastructure-3"
	Certificate *x509.Certificate
	Phase       Phase // of a root
}

// Certificates lists the roots and intermediates in use.
func (a *Authority) Certificates() []Line {
	a.mu.RLock()
	defer a.mu.RUnlock()
	var out []Line
	for _, r := range a.state.Roots {
		out = append(out, Line{r.ID, a.pairs[r.ID].cert, r.Phase})
	}
	for _, im := range []Intermediate{a.state.Workload, a.state.Infrastructure} {
		out = append(out, Line{im.ID, a.pairs[im.ID].cert, ""})
	}
	return out
}

// Step tells the authority what happened and carries out what follows. It returns
// the actions that were carried out. On an error nothing changed for anybody but
// the disk, and the next Step tries again.
func (a *Authority) Step(e Event) ([]Action, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	next, actions := Step(a.state, e, a.now(), a.policy)
	if len(actions) == 0 && !a.dirty && next.Deadline.Equal(a.state.Deadline) && samePhases(a.state, next) {
		return nil, nil
	}
	made := map[string]*pair{}
	for _, act := range actions {
		if err := a.make(act, made); err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: "rotate certificates: " + act.String(), Err: err}
		}
	}
	for id, p := range a.pairs {
		if made[id] == nil {
			made[id] = p
		}
	}
	if err := a.save(next); err != nil {
		return nil, err
	}
	a.state, a.pairs, a.dirty = next, made, false
	for _, act := range actions {
		if d, ok := act.(Destroy); ok {
			delete(a.pairs, d.ID)
			if err := a.folder.removePair(d.ID); err != nil {
				return actions, &assay.Error{Kind: assay.Internal, Op: "rotate certificates: " + act.String(), Err: err, Remedy: "the next start removes it"}
			}
		}
	}
	return actions, nil
}

func samePhases(a, b State) bool {
	if len(a.Roots) != len(b.Roots) {
		return false
	}
	for i := range a.Roots {
		if a.Roots[i].Phase != b.Roots[i].Phase {
			return false
		}
	}
	return true
}

func (a *Authority) save(s State) error {
	b, err := json.MarshalIndent(saved{a.trustDomain, s}, "", "  ")
	if err == nil {
		err = a.folder.write(stateFile, append(b, '\n'))
	}
	if err != nil {
		return &assay.Error{Kind: assay.Internal, Op: "store the authority's state in " + a.folder.path, Err: err, Remedy: "free or repair the disk"}
	}
	return nil
}

// make makes the key pair of an action and stores it.
func (a *Authority) make(act Action, made map[string]*pair) error {
	var id string
	var parent *pair
	tmpl := &x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: a.trustDomain}}, // X509-SVID section 2: a signer names its domain
	}
	switch act := act.(type) {
	case MakeRoot:
		id = act.ID
		tmpl.NotBefore, tmpl.NotAfter = act.NotBefore, act.NotAfter
		tmpl.MaxPathLen = 1
	case MakeIntermediate:
		id = act.ID
		tmpl.NotBefore, tmpl.NotAfter = act.NotBefore, act.NotAfter
		tmpl.MaxPathLenZero = true
		tmpl.Policies = []x509.OID{policyOf(act.Use)}
		if parent = made[act.Root]; parent == nil {
			parent = a.pairs[act.Root]
		}
	default:
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	p := &pair{id: id, key: key}
	if parent == nil {
		parent = &pair{id: id, key: key, cert: tmpl}
	}
	tmpl.SerialNumber = newSerial()
	tmpl.Subject = pkix.Name{Organization: []string{"Assay"}, OrganizationalUnit: []string{a.trustDomain}, CommonName: id}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent.cert, &key.PublicKey, parent.key)
	if err != nil {
		return err
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	made[id] = p
	return a.folder.writePair(p)
}

func policyOf(use Use) x509.OID {
	if use == Infrastructure {
		return assay.InfrastructurePolicy
	}
	return assay.WorkloadPolicy
}

// newSerial returns 128 random bits, never zero, positive.
func newSerial() *big.Int {
	var b [16]byte
	for {
		rand.Read(b[:]) // never fails (crypto/rand)
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}
