package joining

import (
	"os"
	"slices"
	"strings"
	"testing"

	"assay.dev/test/lab"
)

// TestWhatChangesWhenIJoin makes every observation twice and holds the differences
// against the table.
func TestWhatChangesWhenIJoin(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent", "ss")
	all := slices.Concat(connections, exchanges, surroundings)
	seen := map[lab.Mode]map[string]string{}
	for _, mode := range []lab.Mode{lab.Direct, lab.Meshed} {
		t.Run(string(mode), func(t *testing.T) {
			s := newStage(t, mode)
			got := map[string]string{}
			for _, o := range all {
				got[o.id] = o.make(s)
				t.Logf("%-32s %s", o.id, got[o.id])
			}
			seen[mode] = got
		})
	}
	if seen[lab.Direct] == nil || seen[lab.Meshed] == nil {
		return // a subtest has said why
	}
	table := readTable(t, "../../docs/joining.md")
	for _, o := range all {
		direct, meshed := seen[lab.Direct][o.id], seen[lab.Meshed][o.id]
		row, documented := table[o.id]
		delete(table, o.id)
		switch {
		case direct == meshed && documented:
			t.Errorf("%s: docs/joining.md says that it changes; it does not: %s", o.id, direct)
		case direct != meshed && !documented:
			t.Errorf("%s changes and docs/joining.md does not say so:\n\tdirect: %s\n\tmeshed: %s", o.id, direct, meshed)
		case documented && (row.direct != direct || row.meshed != meshed):
			t.Errorf("%s changes otherwise than docs/joining.md says:\n\tdirect: %s\n\tthere:  %s\n\tmeshed: %s\n\tthere:  %s", o.id, direct, row.direct, meshed, row.meshed)
		}
	}
	for id := range table {
		t.Errorf("docs/joining.md has a row for %s, which nobody observes", id)
	}
}

type row struct{ direct, meshed, why string }

// readTable reads the rows whose first cell is an observation's name in backquotes.
func readTable(t *testing.T, file string) map[string]row {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	table := map[string]row{}
	for line := range strings.Lines(string(text)) {
		cell := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cell {
			cell[i] = strings.TrimSpace(cell[i])
		}
		if len(cell) < 4 || !strings.HasPrefix(cell[0], "`") {
			continue
		}
		id := strings.Trim(cell[0], "`")
		if _, twice := table[id]; twice {
			t.Errorf("%s: %s stands there twice", file, id)
		}
		if cell[3] == "" {
			t.Errorf("%s: %s has no reason", file, id)
		}
		table[id] = row{cell[1], cell[2], cell[3]}
	}
	return table
}
