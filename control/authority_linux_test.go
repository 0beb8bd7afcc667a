package control

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/identity"
)

// TestWrongOrderIntoTheStore: of the controls that are started with a sealing key on the store of a
// mesh whose authority is in a folder, those without that folder make no other authority, nor
// put one of another mesh there; the one that has it goes on as that mesh.
func TestWrongOrderIntoTheStore(t *testing.T) {
	t.Parallel()
	for driver, url := range map[string]string{"postgres": newServer(t).url(), "sqlite": "sqlite:" + filepath.Join(t.TempDir(), "state.db")} {
		t.Run(driver, func(t *testing.T) {
			t.Parallel()
			key, err := identity.ParseSealingKeys([]byte(identity.NewSealingKey()))
			if err != nil {
				t.Fatal(err)
			}
			alone := start(t, func(cfg *Config) { cfg.Store, cfg.takeover = url, time.Second })
			h := alone.join(t, "one", "bank/*")
			root := alone.authority.SigningRoot()
			alone.stop()
			another := start(t, nil)
			another.stop()
			for what, data := range map[string]string{"an empty folder": t.TempDir(), "the folder of another mesh": another.cfg.Data} {
				c, err := Open(t.Context(), Config{Data: data, Store: url, Authority: key, TrustDomain: "bank.test", takeover: time.Second})
				if err == nil {
					c.Close()
				}
				if assay.KindOf(err) != assay.Conflict || !strings.Contains(err.Error(), "another authority") && !strings.Contains(err.Error(), "no authority") {
					t.Errorf("%s: %v", what, err)
				}
			}
			moved := alone.restart(func(cfg *Config) { cfg.Authority = key })
			if string(moved.authority.SigningRoot()) != string(root) {
				t.Error("it is another authority")
			}
			syncHost(t, h.at(t, moved).hosts, nil)
		})
	}
}
