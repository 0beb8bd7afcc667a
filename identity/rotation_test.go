package identity

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// TestTranscripts runs each file in testdata/rotation: a command is a time that
// passes and an event; beneath its "----" is what follows.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/rotation/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := transcript(t, string(in))
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

func transcript(t *testing.T, in string) string {
	t.Helper()
	var out strings.Builder
	var s State
	now, p := epoch, DefaultPolicy
	result := false
	for line := range strings.Lines(in) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case result && line != "":
			continue // the old result
		case line == "" || line[0] == '#':
			result = false
		case strings.HasPrefix(line, "policy "):
			for _, f := range strings.Fields(line)[1:] {
				k, v, _ := strings.Cut(f, "=")
				*map[string]*time.Duration{"root": &p.RootLife, "lead": &p.RootLead, "force": &p.RootForce, "intermediate": &p.IntermediateLife}[k] = duration(t, v)
			}
		case line == "----":
			result = true
			continue
		default:
			f := strings.Fields(line)
			now = now.Add(duration(t, f[0]))
			var e Event
			switch f[1] {
			case "tick":
				e = Tick{}
			case "acks":
				least := uint64(NobodyLeft)
				if f[2] != "none" {
					least, _ = strconv.ParseUint(f[2], 10, 64)
				}
				e = Acknowledged{least}
			case "issue":
				e = Issued{f[2], now.Add(duration(t, f[3]))}
			case "rotate":
				var deadline time.Time
				if len(f) > 2 {
					deadline = now.Add(duration(t, f[2]))
				}
				e = Rotate{deadline}
			default:
				t.Fatalf("unknown event in %q", line)
			}
			next, actions := Step(s, e, now, p)
			fmt.Fprintf(&out, "%s\n----\n", line)
			for _, a := range actions {
				fmt.Fprintf(&out, "%s\n", a)
			}
			fmt.Fprintf(&out, "= %s\n", describe(next))
			s = next
			continue
		}
		out.WriteString(line + "\n")
	}
	return out.String()
}

func duration(t *testing.T, s string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(strings.TrimPrefix(s, "+"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func describe(s State) string {
	var b strings.Builder
	fmt.Fprintf(&b, "bundle %d:", s.Bundle)
	for _, r := range s.Roots {
		fmt.Fprintf(&b, " %s %s", r.ID, r.Phase)
		if !r.Leaves.IsZero() {
			fmt.Fprintf(&b, " (leaves until %s)", r.Leaves.UTC().Format("01-02 15:04"))
		}
	}
	fmt.Fprintf(&b, "; %s, %s", s.Workload.ID, s.Infrastructure.ID)
	if !s.Deadline.IsZero() {
		fmt.Fprintf(&b, "; deadline %s", s.Deadline.UTC().Format("01-02 15:04"))
	}
	return b.String()
}

// leaf is a simulated certificate.
type leaf struct {
	root     string
	notAfter time.Time
}

// member is a simulated proxy: the bundle that it trusts and its certificate.
type member struct {
	version uint64
	roots   map[string]bool
	leaf    leaf
	renewAt time.Time
	next    uint64 // bundle on its way
	arrives time.Time
}

// TestYears lives through years of rotations with proxies that are slow to learn,
// and asserts at every hour what rotation is for: every live certificate is trusted
// by every live proxy, and everything lives within what signed it.
func TestYears(t *testing.T) {
	began := time.Now()
	for seed := range uint64(8) {
		years(t, seed)
	}
	t.Logf("8 times 2 years in %v", time.Since(began))
}

func years(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 7))
	p := Policy{RootLife: 120 * day, RootLead: 40 * day, RootForce: 5 * day, IntermediateLife: 20 * day, Skew: time.Minute}
	now := epoch
	s, actions := Step(State{}, Tick{}, now, p)
	bundles := map[uint64][]string{}
	note := func(actions []Action) {
		for _, a := range actions {
			if a, ok := a.(Publish); ok {
				if a.Version != uint64(len(bundles)+1) {
					t.Fatalf("seed %d: bundle %d follows %d", seed, a.Version, len(bundles))
				}
				bundles[a.Version] = a.Roots
			}
		}
	}
	note(actions)
	members := make([]*member, 12)
	learn := func(m *member, version uint64) {
		m.version, m.roots = version, map[string]bool{}
		for _, id := range bundles[version] {
			m.roots[id] = true
		}
	}
	for i := range members {
		members[i] = &member{}
		learn(members[i], 1)
	}
	used := map[string]bool{}
	for hour := range 2 * 365 * 24 {
		now = epoch.Add(time.Duration(hour) * time.Hour)
		least := uint64(NobodyLeft)
		for _, m := range members {
			if !m.arrives.IsZero() && !now.Before(m.arrives) {
				learn(m, m.next)
				m.arrives = time.Time{}
			}
			least = min(least, m.version)
		}
		var e Event = Acknowledged{least}
		if r.IntN(24*40) == 0 {
			e = Rotate{}
		}
		s, actions = Step(s, e, now, p)
		note(actions)
		for _, m := range members {
			if m.version < s.Bundle && m.arrives.IsZero() {
				m.next, m.arrives = s.Bundle, now.Add(time.Duration(r.IntN(72))*time.Hour)
			}
			if !now.Before(m.renewAt) {
				notAfter := earliest(now.Add(WorkloadLife), s.Workload.NotAfter)
				m.leaf = leaf{s.Workload.Root, notAfter}
				m.renewAt = RenewAt(now, notAfter, r.Float64())
				used[m.leaf.root] = true
				s, _ = Step(s, Issued{m.leaf.root, notAfter}, now, p)
				if m.renewAt.After(notAfter) || notAfter.Sub(now) < 12*time.Hour {
					t.Fatalf("seed %d hour %d: leaf lives %v", seed, hour, notAfter.Sub(now))
				}
			}
		}
		for _, a := range members {
			for _, b := range members {
				if !a.roots[b.leaf.root] {
					t.Fatalf("seed %d hour %d: a proxy with bundle %d %v does not trust a leaf beneath %s; %s", seed, hour, a.version, bundles[a.version], b.leaf.root, describe(s))
				}
			}
		}
		signing := 0
		for _, root := range s.Roots {
			if root.Phase == Signing {
				signing++
				if s.Workload.Root != root.ID || s.Infrastructure.Root != root.ID || s.Workload.NotAfter.After(root.NotAfter) {
					t.Fatalf("seed %d hour %d: %s", seed, hour, describe(s))
				}
			}
		}
		if signing != 1 || len(s.Roots) > 4 {
			t.Fatalf("seed %d hour %d: %s", seed, hour, describe(s))
		}
	}
	if len(used) < 8 {
		t.Errorf("seed %d: only %d roots were used; the test proves little", seed, len(used))
	}
}

// TestStepIsPure holds Step to its word that a State is a value.
func TestStepIsPure(t *testing.T) {
	s, _ := Step(State{}, Tick{}, epoch, DefaultPolicy)
	s, _ = Step(s, Rotate{}, epoch, DefaultPolicy)
	before := fmt.Sprintf("%+v", s)
	Step(s, Acknowledged{NobodyLeft}, epoch.Add(time.Hour), DefaultPolicy)
	Step(s, Issued{"root-1", epoch.Add(day)}, epoch, DefaultPolicy)
	if after := fmt.Sprintf("%+v", s); after != before {
		t.Errorf("changed:\n%s\n%s", before, after)
	}
}
