// Package programs runs real, unmodified programs from Debian as plain hosts and
// as workloads of the mesh: each scenario is written once, runs in both modes,
// and marks no port. What a scenario asserts in direct mode it asserts meshed.
package programs

import (
	"testing"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

type scenario struct {
	name     string
	programs []string
	run      func(t *testing.T, w *lab.World)
}

// run runs scenarios one after another in one world for each mode.
func run(t *testing.T, list []scenario) {
	lab.Require(t, "ip", "nft", "getent")
	lab.Modes(t, func(t *testing.T, w *lab.World) {
		for _, s := range list {
			t.Run(s.name, func(t *testing.T) {
				lab.Require(t, s.programs...)
				s.run(t, w)
			})
		}
	})
}
