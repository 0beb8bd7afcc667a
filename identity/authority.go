package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"assay.dev"
)

// Config says what authority to open.
type Config struct {
	Dir string // holds keys and state; made when it is not there
	// Vault and Keys, given together, keep the authority in a vault that others share, and
	// not in Dir. What is in Dir is taken over by a vault that has none.
	Vault       Vault
	Keys        *SealingKeys
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
	keep        keep
	shared      bool // others sign with the same keys

	stepping  sync.Mutex // held while what is kept changes; before mu
	mu        sync.RWMutex
	state     State
	dirty     bool             // what is kept is older in what may wait (Root.Leaves)
	pairs     map[string]*pair // replaced, never changed
	confirmed time.Time        // when the state was last seen to be what is kept, if shared
}

// keep is where an authority is kept. One goroutine at a time uses it.
type keep interface {
	// read returns what is kept, with the pairs that it names; nil: there is nothing.
	read() (*saved, map[string]*pair, error)
	// replace keeps s with its pairs, of which those in made are new. It returns false when
	// another process has replaced what was read or kept last.
	replace(s saved, pairs, made map[string]*pair) (bool, error)
	// forget removes a pair that replace was not given.
	forget(id string) error
	where() string
	close() error
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

// Open opens the authority in cfg.Dir or cfg.Vault, or makes a new one there. A folder is one
// process's: the caller makes sure of that, and closes it.
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
	a := &Authority{trustDomain: cfg.TrustDomain, policy: cfg.Policy, leafLife: cfg.LeafLife, now: cfg.Now, shared: cfg.Vault != nil, pairs: map[string]*pair{}}
	if a.shared {
		if a.policy.Apart == 0 {
			a.policy.Apart = DefaultApart
		}
		a.keep = &sealed{vault: cfg.Vault, keys: cfg.Keys}
	} else {
		f, err := openFolder(cfg.Dir)
		if err != nil {
			return nil, err
		}
		a.keep = f
	}
	if err := a.load(cfg.Dir); err != nil {
		return nil, errors.Join(err, a.keep.close())
	}
	if _, err := a.Step(Tick{}); err != nil {
		return nil, errors.Join(err, a.keep.close())
	}
	return a, nil
}

// load takes what is kept, or what a folder has that is to be taken over.
func (a *Authority) load(dir string) error {
	op := "open the authority in " + a.keep.where()
	s, pairs, err := a.keep.read()
	if err == nil && s == nil && a.shared {
		s, err = a.takeOver(dir)
		if err == nil && s != nil {
			s, pairs, err = a.keep.read()
		}
	}
	if err != nil {
		return err
	}
	if s == nil {
		if !assay.ValidTrustDomain(a.trustDomain) {
			return &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("trust domain %q: may hold a-z, 0-9, '.', '-' and '_'", a.trustDomain)}
		}
		return nil
	}
	if a.trustDomain != "" && a.trustDomain != s.TrustDomain {
		return &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("it is the authority of %s, not of %s", s.TrustDomain, a.trustDomain),
			Remedy: "a mesh keeps its trust domain; for another one use another data folder"}
	}
	a.trustDomain, a.state, a.pairs, a.confirmed = s.TrustDomain, s.State, pairs, a.now()
	return nil
}

// takeOver puts a folder's authority into the vault. Of two that try one succeeds.
func (a *Authority) takeOver(dir string) (*saved, error) {
	if dir == "" {
		return nil, nil
	}
	if _, err := os.Lstat(filepath.Join(dir, stateFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer f.close()
	s, pairs, err := f.read()
	if err == nil && s != nil {
		_, err = a.keep.replace(*s, pairs, nil)
	}
	return s, err
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
	a.stepping.Lock()
	defer a.stepping.Unlock()
	a.mu.RLock()
	defer a.mu.RUnlock()
	var err error
	if a.dirty {
		_, err = a.save(a.state, a.pairs, nil)
	}
	return errors.Join(err, a.keep.close())
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

// swaps bounds how often a step is computed anew because another process was first.
const swaps = 5

// Step tells the authority what happened and carries out what follows. It returns
// the actions that were carried out. On an error nothing changed for anybody but
// the disk, and the next Step tries again. Of several processes that share an authority one
// takes each step; the others follow it, here and in Follow.
func (a *Authority) Step(e Event) ([]Action, error) {
	a.stepping.Lock()
	defer a.stepping.Unlock()
	for range swaps {
		actions, done, err := a.step(e)
		if done || err != nil {
			return actions, err
		}
		if err := a.reload(); err != nil {
			return nil, err
		}
	}
	return nil, &assay.Error{Kind: assay.Unavailable, Op: "rotate certificates", Err: errors.New("other controls keep being first"), Remedy: "try again"}
}

// step is one attempt, under stepping; done is false when another process was first. Keys are
// made and stored without mu: signing goes on.
func (a *Authority) step(e Event) (actions []Action, done bool, err error) {
	a.mu.RLock()
	state, pairs, dirty := a.state, a.pairs, a.dirty
	a.mu.RUnlock()
	next, actions := Step(state, e, a.now(), a.policy)
	if len(actions) == 0 && !dirty && next.Deadline.Equal(state.Deadline) && samePhases(state, next) {
		return nil, true, nil
	}
	made := map[string]*pair{}
	for _, act := range actions {
		if err := a.make(act, pairs, made); err != nil {
			return nil, false, &assay.Error{Kind: assay.Internal, Op: "rotate certificates: " + act.String(), Err: err}
		}
	}
	all := map[string]*pair{}
	for _, id := range next.ids() {
		if all[id] = made[id]; all[id] == nil {
			all[id] = pairs[id]
		}
	}
	swapped, err := a.save(next, all, made)
	if err != nil || !swapped {
		return nil, false, err
	}
	a.install(next, all)
	for _, act := range actions {
		if d, ok := act.(Destroy); ok {
			if err := a.keep.forget(d.ID); err != nil {
				return actions, true, &assay.Error{Kind: assay.Internal, Op: "rotate certificates: " + act.String(), Err: err, Remedy: "the next start removes it"}
			}
		}
	}
	return actions, true, nil
}

// install makes what is kept the state in effect, with the leaves that were signed since.
func (a *Authority) install(next State, pairs map[string]*pair) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dirty = false
	for _, was := range a.state.Roots {
		for i := range next.Roots {
			if r := &next.Roots[i]; r.ID == was.ID && r.Leaves.Before(was.Leaves) {
				r.Leaves, a.dirty = was.Leaves, true
			}
		}
	}
	a.state, a.pairs, a.confirmed = next, pairs, a.now()
}

// reload takes what another process has stored, under stepping.
func (a *Authority) reload() error {
	s, pairs, err := a.keep.read()
	if err != nil {
		return err
	}
	if s == nil || s.TrustDomain != a.trustDomain {
		return &assay.Error{Kind: assay.Conflict, Op: "follow the authority in " + a.keep.where(), Err: errors.New("it is not there any more, or another mesh's"), Remedy: "restore the store from its backup"}
	}
	a.install(s.State, pairs)
	return nil
}

// Follow takes the steps that another process took, if the authority is shared, and
// reports whether there were any. Called often: an authority that has not been able to for
// Policy.Apart signs nothing.
func (a *Authority) Follow() (bool, error) {
	kept, ok := a.keep.(*sealed)
	if !ok {
		return false, nil
	}
	a.stepping.Lock()
	defer a.stepping.Unlock()
	asked := a.now()
	changed, err := kept.changed()
	switch {
	case err != nil:
		return false, err
	case changed:
		return true, a.reload()
	}
	a.mu.Lock()
	a.confirmed = asked
	a.mu.Unlock()
	return false, nil
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

func (a *Authority) save(s State, pairs, made map[string]*pair) (bool, error) {
	swapped, err := a.keep.replace(saved{a.trustDomain, s}, pairs, made)
	if err == nil {
		return swapped, nil
	}
	if _, ok := errors.AsType[*assay.Error](err); ok {
		return false, err
	}
	return false, &assay.Error{Kind: assay.Internal, Op: "store the authority's state in " + a.keep.where(), Err: err, Remedy: "free or repair the disk"}
}

// make makes the key pair of an action.
func (a *Authority) make(act Action, pairs, made map[string]*pair) error {
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
			parent = pairs[act.Root]
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
	return nil
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
