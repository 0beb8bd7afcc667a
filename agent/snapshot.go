package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/protobuf/encoding/protodelim"
)

// snapshot is what control said, piece by piece. The pieces are immutable; the
// collection is guarded by Agent.mu. A stream to control gathers news beside it until
// control says that they are whole, so proxies never see half of them.
type snapshot struct {
	epoch     uint64
	version   uint64
	revision  int64                // of the store that controls share: the next one must not know less
	resources map[string]*resource // by api.Resource.Key
	bundle    *api.Bundle
}

// resource is one piece, as it came and as a noun: one of the pointers is set.
type resource struct {
	message   *api.Resource
	workload  *assay.Workload
	service   *assay.Service
	namespace *assay.NamespaceConfig
	host      *assay.Host
	route     *assay.Route
}

func newSnapshot(epoch uint64) *snapshot {
	return &snapshot{epoch: epoch, resources: map[string]*resource{}}
}

// news are what control says until it is whole.
type news struct {
	anew     bool // control counts anew: what it does not tell is not there
	epoch    uint64
	version  uint64
	revision int64
	pieces   map[string]*resource // nil: gone
}

// known is what a stream begins with.
func (s *snapshot) known() map[string]uint64 {
	known := make(map[string]uint64, len(s.resources))
	for key, r := range s.resources {
		known[key] = r.message.GetVersion()
	}
	return known
}

// apply takes a delta in. A piece that is malformed is left out and reported, the
// rest counts: one wrong record must not blind a host.
func (n *news) apply(d *api.Delta) error {
	var failed error
	if n.pieces == nil {
		n.pieces = map[string]*resource{}
	}
	for _, key := range d.GetRemove() {
		n.pieces[key] = nil
	}
	for _, m := range d.GetUpsert() {
		r, err := readResource(m)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		n.pieces[m.GetKey()] = r
	}
	n.version, n.revision = d.GetVersion(), d.GetRevision()
	return failed
}

// take takes news in.
func (s *snapshot) take(n *news) {
	if n.anew {
		clear(s.resources)
		s.epoch = n.epoch
	}
	for key, r := range n.pieces {
		if r == nil {
			delete(s.resources, key)
		} else {
			s.resources[key] = r
		}
	}
	s.version, s.revision = n.version, n.revision
}

// empty reports whether it is of a kind that this agent does not know.
func (r *resource) empty() bool {
	return r.workload == nil && r.service == nil && r.namespace == nil && r.host == nil && r.route == nil
}

func readResource(m *api.Resource) (*resource, error) {
	r := &resource{message: m}
	key := ""
	switch {
	case m.GetWorkload() != nil:
		v, err := m.GetWorkload().Noun()
		if err != nil {
			return nil, err
		}
		r.workload, key = &v, "workload/"+v.ID
	case m.GetService() != nil:
		v, err := m.GetService().Noun()
		if err != nil {
			return nil, err
		}
		r.service, key = &v, "service/"+v.Key()
	case m.GetNamespace() != nil:
		v, err := m.GetNamespace().Noun()
		if err != nil {
			return nil, err
		}
		r.namespace, key = &v, "namespace/"+v.Namespace
	case m.GetHost() != nil:
		v, err := m.GetHost().Noun()
		if err != nil {
			return nil, err
		}
		r.host, key = &v, "host/"+v.ID
	case m.GetRoute() != nil:
		v, err := m.GetRoute().Noun()
		if err != nil {
			return nil, err
		}
		r.route, key = &v, "route/"+v.Key()
	default:
		// A newer control may know kinds that this agent does not.
		return r, nil
	}
	if key != m.GetKey() {
		return nil, fmt.Errorf("resource %q holds %s", m.GetKey(), key)
	}
	return r, nil
}

// hasWorkload reports whether id is published.
func (s *snapshot) hasWorkload(id string) bool { return s.resources["workload/"+id] != nil }

// updates are the snapshot as what control would send to a host that knows nothing: a
// welcome with the epoch, the bundle, one delta.
func (s *snapshot) updates() []*api.ControlUpdate {
	d := &api.Delta{Version: s.version, Revision: s.revision, Complete: true, Upsert: make([]*api.Resource, 0, len(s.resources))}
	for _, r := range s.resources {
		d.Upsert = append(d.Upsert, r.message)
	}
	updates := []*api.ControlUpdate{{Update: &api.ControlUpdate_Welcome{Welcome: &api.Welcome{Epoch: s.epoch}}}}
	if s.bundle != nil {
		updates = append(updates, &api.ControlUpdate{Update: &api.ControlUpdate_Bundle{Bundle: s.bundle}})
	}
	return append(updates, &api.ControlUpdate{Update: &api.ControlUpdate_Delta{Delta: d}})
}

// encode writes updates for loadSnapshot.
func encode(updates []*api.ControlUpdate) ([]byte, error) {
	var b bytes.Buffer
	for _, u := range updates {
		if _, err := protodelim.MarshalTo(&b, u); err != nil {
			return nil, fmt.Errorf("encode snapshot: %w", err)
		}
	}
	return b.Bytes(), nil
}

// loadSnapshot reads what encode wrote. A file that is not there or broken is an
// empty snapshot: control sends everything then.
func loadSnapshot(path string) (*snapshot, error) {
	s := newSnapshot(0)
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	defer f.Close()
	r := bufio.NewReader(f)
	for {
		var u api.ControlUpdate
		err := protodelim.UnmarshalOptions{MaxSize: -1}.UnmarshalFrom(r, &u)
		if err == io.EOF {
			return s, nil
		}
		if err != nil {
			return newSnapshot(0), fmt.Errorf("read %s: %w", path, err)
		}
		switch {
		case u.GetWelcome() != nil:
			s.epoch = u.GetWelcome().GetEpoch()
		case u.GetBundle() != nil:
			s.bundle = u.GetBundle()
		case u.GetDelta() != nil:
			var n news
			if err := n.apply(u.GetDelta()); err != nil {
				return newSnapshot(0), fmt.Errorf("read %s: %w", path, err)
			}
			s.take(&n)
		}
	}
}
