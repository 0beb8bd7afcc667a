package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/protobuf/encoding/protodelim"
)

// snapshot is what control said, piece by piece. The pieces are immutable; the
// collection is guarded by Agent.mu. A stream to control builds a new one beside it
// until control says that it is whole, so proxies never see half of one.
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

func (s *snapshot) clone() *snapshot {
	c := *s
	c.resources = maps.Clone(s.resources)
	return &c
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
func (s *snapshot) apply(d *api.Delta) error {
	var failed error
	for _, key := range d.GetRemove() {
		delete(s.resources, key)
	}
	for _, m := range d.GetUpsert() {
		r, err := readResource(m)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		s.resources[m.GetKey()] = r
	}
	s.version, s.revision = d.GetVersion(), d.GetRevision()
	return failed
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

// encode writes the snapshot as what control would send to a host that knows
// nothing: a welcome with the epoch, the bundle, one delta.
func (s *snapshot) encode() ([]byte, error) {
	d := &api.Delta{Version: s.version, Revision: s.revision, Complete: true}
	for _, r := range s.resources {
		d.Upsert = append(d.Upsert, r.message)
	}
	updates := []*api.ControlUpdate{{Update: &api.ControlUpdate_Welcome{Welcome: &api.Welcome{Epoch: s.epoch}}}}
	if s.bundle != nil {
		updates = append(updates, &api.ControlUpdate{Update: &api.ControlUpdate_Bundle{Bundle: s.bundle}})
	}
	updates = append(updates, &api.ControlUpdate{Update: &api.ControlUpdate_Delta{Delta: d}})
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
			if err := s.apply(u.GetDelta()); err != nil {
				return newSnapshot(0), fmt.Errorf("read %s: %w", path, err)
			}
		}
	}
}
