package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// store is the agent's folder:
//
//	lock            held for the life of the process
//	host.json       hostState
//	snapshot        the last snapshot (snapshot.go)
//	workloads/ID.json   record
//	workloads/ID.log    the proxy's standard error
//
// Files are 0600 and replaced whole, so a reader after a crash sees the old or the
// new one. No key of a workload is ever among them.
type store struct {
	dir  string
	lock *os.File
}

// hostState is what control told this host, and what must not start anew.
type hostState struct {
	HostID      string            `json:"hostID"`
	TrustDomain string            `json:"trustDomain"`
	Mesh        []netip.Prefix    `json:"mesh"`
	Addresses   []netns.Allocator `json:"addresses"` // one for each of the host's prefixes
	LastNumber  uint32            `json:"lastNumber"`
	Boot        string            `json:"boot"`
}

func (s *hostState) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, a := range s.Addresses {
		out = append(out, a.Prefix)
	}
	return out
}

// virtual returns the mesh networks of services' addresses: those that hold no
// prefix of a host. Every host has one of each network of workloads.
func (s *hostState) virtual() []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.Mesh), func(m netip.Prefix) bool {
		return slices.ContainsFunc(s.Addresses, func(a netns.Allocator) bool { return m.Overlaps(a.Prefix) })
	})
}

// processRef names a process for as long as the machine runs.
type processRef struct {
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"`
}

func refOf(p *attest.Process) processRef { return processRef{p.PID(), p.Start()} }

func (r processRef) open() (*attest.Process, error) {
	if r.PID == 0 {
		return nil, attest.ErrGone
	}
	return attest.Reopen(r.PID, r.Start)
}

// record is everything that is needed to find a workload again.
type record struct {
	Boot     string         `json:"boot"`
	Number   uint32         `json:"number"` // names its port and its proxy's user
	Workload assay.Workload `json:"workload"`
	Tree     string         `json:"tree,omitempty"`
	Port     string         `json:"port"`
	NetNS    uint64         `json:"netns"`
	Began    time.Time      `json:"began,omitzero"` // since when its link is metered
	Outbound uint16         `json:"outbound"`       // ports of the listeners
	Inbound  uint16         `json:"inbound"`
	// Listeners are the inodes of the sockets by role.
	Listeners map[string]uint64 `json:"listeners,omitempty"`
	Proxy     processRef        `json:"proxy"`
	ProxyExe  assay.Digest      `json:"proxyExe"`
	// ProxyDomain is the trust domain that the proxy is of, the workload's unless the host
	// has joined another mesh since.
	ProxyDomain string        `json:"proxyDomain,omitempty"`
	Next        *proxyRecord  `json:"next,omitempty"`  // a successor that does not accept yet
	Older       []proxyRecord `json:"older,omitempty"` // predecessors that drain
	Given       *given        `json:"given,omitempty"` // of a pod
	Owner       processRef    `json:"owner"`           // `assay run`
	Command     processRef    `json:"command"`         // what it started
}

// proxyRecord is a proxy beside the one that accepts.
type proxyRecord struct {
	Process processRef   `json:"process"`
	Exe     assay.Digest `json:"exe"`
	Domain  string       `json:"domain,omitempty"`
	Until   time.Time    `json:"until,omitzero"` // when its drain ends
}

func openStore(dir string) (*store, error) {
	op := "open state folder " + dir
	if err := os.MkdirAll(filepath.Join(dir, "workloads"), 0o700); err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "run as root, or name a folder of your own with --data"}
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, &assay.Error{Kind: assay.Conflict, Op: op, Err: errors.New("another agent uses it"), Remedy: "stop that one, or use another folder"}
	}
	return &store{dir: dir, lock: f}, nil
}

func (s *store) Close() error { return s.lock.Close() }

func (s *store) path(name ...string) string {
	return filepath.Join(append([]string{s.dir}, name...)...)
}

func (s *store) loadHost() (hostState, error) {
	var h hostState
	err := readJSON(s.path("host.json"), &h)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return h, err
}

func (s *store) saveHost(h hostState) error { return writeJSON(s.path("host.json"), h) }

func (s *store) saveRecord(r *record) error {
	return writeJSON(s.path("workloads", r.Workload.ID+".json"), r)
}

// records returns what can be read, and the names of files that cannot.
func (s *store) records() (list []record, broken []string, err error) {
	entries, err := os.ReadDir(s.path("workloads"))
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		var r record
		if err := readJSON(s.path("workloads", e.Name()), &r); err != nil || r.Workload.ID != id {
			broken = append(broken, e.Name())
			continue
		}
		list = append(list, r)
	}
	return list, broken, nil
}

// forget removes what is kept of a workload.
func (s *store) forget(id string) error {
	var failed error
	for _, ext := range []string{".json", ".log"} {
		if err := os.Remove(s.path("workloads", id+ext)); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'), 0o600)
}

// writeFile replaces a file whole: it holds the old or the new content after a
// crash, whenever that was.
func writeFile(path string, b []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
