package control

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"assay.dev/identity"
)

// line is one control's way to the database, which can be cut.
type line struct {
	t    *testing.T
	l    net.Listener
	to   string // unix socket
	all  sync.WaitGroup
	mu   sync.Mutex
	cut  bool
	open map[net.Conn]bool
}

func newLine(t *testing.T, s *server) *line {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &line{t: t, l: l, to: filepath.Join(s.dir, ".s.PGSQL.5432"), open: map[net.Conn]bool{}}
	n.all.Go(n.serve)
	t.Cleanup(func() { l.Close(); n.set(true); n.all.Wait() })
	return n
}

func (n *line) url() string {
	return fmt.Sprintf("postgres://assay@%s/postgres?sslmode=disable", n.l.Addr())
}

func (n *line) serve() {
	for {
		near, err := n.l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("unix", n.to)
		if err != nil {
			near.Close()
			continue
		}
		n.mu.Lock()
		if n.cut {
			near.Close()
			far.Close()
		} else {
			n.open[near], n.open[far] = true, true
			n.all.Go(func() { n.relay(near, far) })
			n.all.Go(func() { n.relay(far, near) })
		}
		n.mu.Unlock()
	}
}

func (n *line) relay(to, from net.Conn) {
	io.Copy(to, from)
	to.Close()
	from.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, to)
	delete(n.open, from)
}

// set cuts the line or mends it.
func (n *line) set(cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut = cut; cut {
		for c := range n.open {
			c.Close()
		}
	}
}

// severalControls are several controls on one database.
type severalControls struct {
	t        *testing.T
	server   *server
	key      *identity.SealingKeys
	change   func(*Config)
	controls []*running
	lines    []*line
}

func newMesh(t *testing.T, n int, change func(*Config)) *severalControls {
	t.Helper()
	key, err := identity.ParseSealingKeys([]byte(identity.NewSealingKey()))
	if err != nil {
		t.Fatal(err)
	}
	m := &severalControls{t: t, server: newServer(t), key: key, change: change}
	for range n {
		m.add()
	}
	return m
}

// add starts one more control.
func (m *severalControls) add() *running {
	m.t.Helper()
	way := newLine(m.t, m.server)
	remote, err := net.Listen("tcp", "127.0.0.1:0") // its port is taken again by start
	if err != nil {
		m.t.Fatal(err)
	}
	remote.Close()
	r := startAt(m.t, remote.Addr().String(), func(cfg *Config) {
		cfg.Log = slog.New(slog.NewTextHandler(m.t.Output(), nil)).With("control", len(m.controls))
		cfg.Store, cfg.Authority, cfg.Advertise, cfg.takeover = way.url(), m.key, remote.Addr().String(), 10*time.Second
		if m.change != nil {
			m.change(cfg)
		}
	})
	m.controls, m.lines = append(m.controls, r), append(m.lines, way)
	return r
}

// crash ends the i-th as kill -9 does: it tells nobody.
func (m *severalControls) crash(i int) {
	m.lines[i].set(true)
	r := m.controls[i]
	r.once.Do(func() {
		r.cancel()
		r.done.Wait()
		r.Close() // it cannot say goodbye
	})
}

// at is a host that goes to another control, with the certificate that it has.
func (h *remoteHost) at(t *testing.T, r *running) *remoteHost {
	t.Helper()
	other := &remoteHost{id: h.id, bundle: h.bundle, cert: h.cert}
	other.connect(t, r)
	return other
}

// heard gives a host the newest bundle that its stream has brought.
func (h *remoteHost) heard(s *agent) *remoteHost {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.bundle = s.bundle
	return h
}

func (r *running) knows(workload string) bool {
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	_, ok := r.model.catalog.Workload(workload)
	return ok
}

func (r *running) hostState(id string) (present, lost, known bool) {
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	h := r.model.hosts[id]
	if h == nil {
		return false, false, false
	}
	return h.present, h.lost, true
}
