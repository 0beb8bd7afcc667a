package control

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// TestLeaseTranscripts runs each file in testdata/leases: a command is a time that
// passes and who comes, goes or becomes idle; beneath its "----" is what follows.
func TestLeaseTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/leases/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := leaseTranscript(t, string(in))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(in) {
				t.Errorf("transcript differs (go test -update writes it anew):\n%s", got)
			}
		})
	}
}

func leaseTranscript(t *testing.T, in string) string {
	t.Helper()
	l := leases{life: 30 * time.Second}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var hosts []lease
	var out strings.Builder
	result := false
	for line := range strings.Lines(in) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case result && line != "":
			continue // the old result
		case line == "" || line[0] == '#':
			result = false
			out.WriteString(line + "\n")
			continue
		case line == "----":
			result = true
			continue
		}
		f := strings.Fields(line)
		d, err := time.ParseDuration(strings.TrimPrefix(f[0], "+"))
		if err != nil {
			t.Fatal(err)
		}
		now = now.Add(d)
		if len(f) > 2 {
			for id := range strings.SplitSeq(f[2], ",") {
				i := slices.IndexFunc(hosts, func(h lease) bool { return h.id == id })
				if i < 0 {
					hosts = append(hosts, lease{id: id})
					i = len(hosts) - 1
				}
				switch h := &hosts[i]; f[1] {
				case "come":
					h.connected, h.lost = true, false
				case "go":
					h.connected, h.away = false, now
				case "idle":
					h.idle = true
				default:
					t.Fatalf("unknown event in %q", line)
				}
			}
		}
		fmt.Fprintf(&out, "%s\n----\n", line)
		for _, id := range l.expire(slices.Clone(hosts), now) {
			fmt.Fprintf(&out, "lost %s\n", id)
			hosts[slices.IndexFunc(hosts, func(h lease) bool { return h.id == id })].lost = true
		}
		if l.panic {
			out.WriteString("panic\n")
		}
	}
	return out.String()
}
