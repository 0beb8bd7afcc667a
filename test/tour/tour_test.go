// Package tour types the commands of the README as they stand there, so that a
// newcomer's first five minutes cannot rot.
package tour

import (
	"os"
	"path"
	"regexp"
	"strings"
	"testing"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// TestFiveMinutes runs the blocks of the section in one shell, waiting between
// commands where a person would: in a root shell, and in that of somebody who is not.
func TestFiveMinutes(t *testing.T) {
	lab.Require(t, "bash", "curl", "python3", "setpriv", "nsenter")
	t.Run("root", func(t *testing.T) { fiveMinutes(t, "/root") })
	t.Run("nobody", func(t *testing.T) {
		fiveMinutes(t, "/tmp/home", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
	})
}

func fiveMinutes(t *testing.T, home string, as ...string) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Five minutes\n")
	if !ok {
		t.Fatal("the README has no section «Five minutes»")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var script strings.Builder
	script.WriteString("set -u\n")
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1) {
		script.WriteString(block[1])
	}
	bin, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	typed := strings.ReplaceAll(script.String(), "$PWD/bin", path.Dir(bin))
	// A person sees `assay up` say that it is ready before typing on, and the
	// signals are a moment old.
	const ready = "for i in $(seq 100); do assay get hosts >/dev/null 2>&1 && break; sleep 0.1; done\n"
	const seen = "for i in $(seq 100); do assay edges --interval 0 | grep -q mtls && break; sleep 0.1; done\n"
	typed = replaceOnce(t, typed, "assay up &\n", "assay up &\n"+ready)
	typed = replaceOnce(t, typed, "assay edges\n", seen+"echo; echo EDGES; assay edges --interval 0\n")
	typed = replaceOnce(t, typed, "assay get namespaces\n", "echo NAMESPACES; assay get namespaces\n")
	typed += "echo check exits with $?\nkill %1; wait\n"

	l := lab.New(t)
	if as != nil {
		l.MustExec(t, "chmod", "0777", l.Dir(t, home, ""))
	}
	r := l.Exec(t, append(as, "env", "HOME="+home, "bash", "-c", "cd; "+typed)...)
	out := r.Stdout + r.Stderr
	for _, want := range []string{
		`(?m)^default/client\s.*default/web\s.*http1\s+mtls`,     // edges
		`(?m)^default/web\s.*http1\s+100%`,                       // stat
		`(?m)^workload\s+spiffe://assay.local/ns/default/sa/web`, // certificates
		`(?s)NAMESPACES.*default\s+strict`,
		`check exits with 0`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("nothing matches %s", want)
		}
	}
	if t.Failed() {
		t.Logf("typed:\n%s\nshown:\n%s", typed, out)
	}
}

func replaceOnce(t *testing.T, s, old, new string) string {
	t.Helper()
	if strings.Count(s, old) != 1 {
		t.Fatalf("the README has %q %d times, want once", old, strings.Count(s, old))
	}
	return strings.Replace(s, old, new, 1)
}
