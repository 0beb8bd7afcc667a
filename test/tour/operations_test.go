package tour

import (
	"os"
	"path"
	"regexp"
	"strings"
	"testing"

	"assay.dev/test/lab"
)

// blocks returns the shell commands of a section of a document.
func blocks(t *testing.T, file, heading, language string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("%s has no section «%s»", file, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var all strings.Builder
	for _, block := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(section, -1) {
		all.WriteString(block[1])
	}
	if all.Len() == 0 {
		t.Fatalf("%s: «%s» has no %s", file, heading, language)
	}
	return all.String()
}

// shell types a script in a lab with Assay in the path.
func shell(t *testing.T, l *lab.Lab, script string) string {
	t.Helper()
	bin, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	l.Write(t, "/tmp/work/web", "#!/bin/sh\nexec python3 -m http.server 8080\n")
	r := l.Exec(t, "bash", "-c", "set -u\nexport PATH="+path.Dir(bin)+":$PATH\ncd /tmp/work\nchmod +x web\n"+script)
	return r.Stdout + r.Stderr
}

func matches(t *testing.T, script, out string, patterns ...string) {
	t.Helper()
	for _, want := range patterns {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("nothing matches %s", want)
		}
	}
	if t.Failed() {
		t.Logf("typed:\n%s\nshown:\n%s", script, out)
	}
}

const (
	hostsAnswer = "for i in $(seq 100); do assay get hosts >/dev/null 2>&1 && break; sleep 0.1; done\n"
	webIsThere  = "for i in $(seq 100); do assay get services | grep -q web && break; sleep 0.1; done\n"
	ending      = "jobs -p | xargs -r kill; wait\n"
)

// TestOneHost types docs/operations.md's commands for one host, and what it says of
// observe and strict.
func TestOneHost(t *testing.T) {
	lab.Require(t, "bash", "curl", "python3")
	const file = "../../docs/operations.md"
	script := blocks(t, file, "One host", "sh")
	script = replaceOnce(t, script, "assay up\n", "assay up &\n"+hostsAnswer)
	script = replaceOnce(t, script, "-- ./web\n", "-- ./web &\n"+webIsThere+
		"assay run --service client -- sh -c 'for i in $(seq 100); do curl -s http://web:8080/ >/dev/null && exit; sleep 0.1; done'\n"+
		"for i in $(seq 100); do assay edges --interval 0 | grep -q mtls && break; sleep 0.1; done\n")
	script = replaceOnce(t, script, "assay edges\n", "echo EDGES; assay edges\n")
	script = replaceOnce(t, script, "assay stat\n", "echo STAT; assay stat\n")
	script = replaceOnce(t, script, "assay check\n", "echo CHECK; assay check; echo exits with $?\n")
	strict := strings.ReplaceAll(blocks(t, file, "From observe to strict", "yaml"), "namespace: bank", "namespace: default")
	script += "cat >strict.yaml <<'EOF'\n" + strict + "EOF\nassay apply -f strict.yaml; assay get namespaces\n" + ending
	out := shell(t, lab.New(t), script)
	matches(t, script, out,
		`(?s)EDGES.*default/client\s.*default/web\s.*http1\s+mtls.*STAT`,
		`(?s)STAT.*default/web\s.*http1.*CHECK`,
		`(?s)CHECK.*exits with 0`,
		`(?m)^default\s+strict`)
}

// TestMoreHosts types its commands for more hosts, and those for operators elsewhere.
func TestMoreHosts(t *testing.T) {
	lab.Require(t, "bash", "python3", "curl")
	const file = "../../docs/operations.md"
	l := lab.New(t)
	script := "echo 127.0.0.1 control.example >>/etc/hosts\n" + blocks(t, file, "More hosts", "sh")
	script = replaceOnce(t, script, "assay control --listen :7400\n", "assay control --listen :7400 &\n"+hostsAnswer)
	script = replaceOnce(t, script, "--token-file token\n", "--token-file token &\n"+
		"for i in $(seq 100); do assay get hosts | grep -q '^host-.*connected\\|host-' && [ -S /run/assay/agent.sock ] && break; sleep 0.1; done\n"+
		"echo HOSTS; assay get hosts\n"+
		"assay run --namespace bank --service web -- echo the bank runs\n"+
		"assay run --namespace other --service web -- echo others run; echo others exit with $?\n")
	script += blocks(t, file, "Operators elsewhere", "sh") + "echo LOOKED\n"
	script += "assay token create --cover 'bank/*' --control control.example:7400 --cert alice.crt --key alice.key --ca alice-ca.crt; echo changes exit with $?\n" + ending
	out := shell(t, l, script)
	matches(t, script, out,
		`(?s)HOSTS.*host-`,
		`(?m)^the bank runs`,
		`not other/web|may run bank`,
		`others exit with 1`,
		`(?s)alice.key.*host-.*LOOKED`,
		`takes an operator`,
		`changes exit with 1`)
	if strings.Contains(out, "\nothers run") {
		t.Error("a namespace that the token does not cover runs")
	}
}
