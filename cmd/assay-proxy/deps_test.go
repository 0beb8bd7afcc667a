package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestDependencies holds what assay-proxy is made of to dependencies.txt, whole: a
// package that is missing there is a decision that somebody has to take, and each
// runs beside a workload's key.
func TestDependencies(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "-f", "{{if .Standard}}std {{end}}{{.ImportPath}}", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	// The standard library's own inner packages change with its releases.
	var got []string
	for line := range strings.Lines(string(out)) {
		p := strings.TrimSpace(line)
		if strings.HasPrefix(p, "std ") && (strings.Contains(p, "internal") || strings.Contains(p, "vendor/")) {
			continue
		}
		got = append(got, p)
	}
	b, err := os.ReadFile("dependencies.txt")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			want = append(want, line)
		}
	}
	for _, p := range got {
		if !slices.Contains(want, p) {
			t.Errorf("%s is not in dependencies.txt", p)
		}
	}
	for _, p := range want {
		if !slices.Contains(got, p) {
			t.Errorf("%s is in dependencies.txt and not used", p)
		}
	}
	for _, p := range want {
		for _, never := range []string{"net/http", "google.golang.org/", "k8s.io/", "database/sql", "modernc.org/", "os/exec", "plugin", "text/template", "assay.dev/agent", "assay.dev/control"} {
			if p = strings.TrimPrefix(p, "std "); strings.HasPrefix(p, never) {
				t.Errorf("%s has no place in a proxy", p)
			}
		}
	}
}
