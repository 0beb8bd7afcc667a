package agent

import (
	"testing"

	"assay.dev"
	"assay.dev/api"
)

// TestSettingsAreKeptFirst: what a namespace is to be is on disk before a proxy hears of it, so
// that an agent which is killed a moment later does not leave one that knows less.
func TestSettingsAreKeptFirst(t *testing.T) {
	a, err := New(testConfig(t.TempDir(), logs(t)))
	if err != nil {
		t.Fatal(err)
	}
	if a.store, err = openStore(a.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	defer a.store.Close()
	onDisk := func() (mode assay.Mode) {
		s, err := loadSnapshot(a.store.path("snapshot"))
		if err != nil {
			t.Fatal(err)
		}
		if r := s.resources["namespace/bank"]; r != nil {
			mode = r.namespace.Mode
		}
		return mode
	}
	a.publish()
	for i, mode := range []assay.Mode{assay.Strict, assay.Observe, assay.Strict} {
		var n news
		c := assay.NamespaceConfig{Namespace: "bank", Mode: mode}
		err := n.apply(&api.Delta{Upsert: []*api.Resource{{Key: "namespace/bank", Version: uint64(i), Body: &api.Resource_Namespace{Namespace: api.FromNamespaceConfig(&c)}}}})
		if err != nil {
			t.Fatal(err)
		}
		a.take(&n)
		a.publish()
		if told, kept := a.view.Load().config("bank").Mode, onDisk(); told != mode || kept != mode {
			t.Errorf("proxies are told %q, on disk is %q; want %q", told, kept, mode)
		}
	}
}
