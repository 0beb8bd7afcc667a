package demo

import (
	"strings"
	"testing"
	"time"

	"assay.dev"
)

func viewSample(at time.Time, requests uint64) sample {
	ev := perfect()
	s := sample{at: at, workloads: ev.members, edges: ev.edges[:2], findings: ev.findings}
	s.workloads[0].Artifacts = assay.ArtifactSet{{Unproven: "an interpreter"}}
	s.edges[0].Requests, s.edges[0].Failures, s.edges[0].Protocol = requests, 1, assay.HTTP1
	s.edges[0].Latency.Buckets[assay.LatencyBucket(3*time.Millisecond)] = requests
	s.edges[1].Security, s.edges[1].Reason, s.edges[1].Requests = assay.Plaintext, "excluded port", 0
	return s
}

func TestScreen(t *testing.T) {
	var b strings.Builder
	v := &View{Out: &b, Terminal: true, Header: []string{"a meshed bank"}, Size: func() (int, int) { return 80, 24 }}
	start := time.Unix(1000, 0)
	for i, requests := range []uint64{100, 150} {
		b.Reset()
		if err := v.Show(viewSample(start.Add(time.Duration(i)*2*time.Second), requests)); err != nil {
			t.Fatal(err)
		}
	}
	got := b.String()
	for _, want := range []string{"\x1b[Ha meshed bank\x1b[K\r\n", "2s  6 of 6 workloads meshed (1 unproven), 1 of 2 edges under mutual TLS", "mtls", "plaintext: exc",
		"front/load", "front/web:8080", "25.0", "99.33 %", "What a person should look at:"} {
		if !strings.Contains(got, want) {
			t.Errorf("the screen lacks %q:\n%s", want, got)
		}
	}
	for l := range strings.SplitSeq(got, "\r\n") {
		if n := len([]rune(strings.NewReplacer("\x1b[K", "", "\x1b[H", "", "\x1b[J", "").Replace(l))); n > 80 {
			t.Errorf("%d columns: %q", n, l)
		}
	}
	v.Size = func() (int, int) { return 200, 5 }
	b.Reset()
	v.Show(viewSample(start.Add(3*time.Second), 150))
	if n := strings.Count(b.String(), "\r\n"); n != 4 {
		t.Errorf("%d lines on a terminal of 5 rows:\n%s", n, b.String())
	}
}

func TestLines(t *testing.T) {
	var b strings.Builder
	v := &View{Out: &b, Header: []string{"a meshed bank"}, Every: 5 * time.Second}
	start := time.Unix(1000, 0)
	for i := range 11 {
		if err := v.Show(viewSample(start.Add(time.Duration(i)*time.Second), uint64(100+10*i))); err != nil {
			t.Fatal(err)
		}
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 4 || lines[0] != "a meshed bank" || !strings.HasPrefix(lines[3], "10s  ") || !strings.Contains(lines[3], "10 requests/s, success 99.50 %") {
		t.Errorf("want a header and a line each 5 s:\n%s", b.String())
	}
	if strings.Contains(b.String(), "\x1b") {
		t.Error("control sequences without a terminal")
	}
}
