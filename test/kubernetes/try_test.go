package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

// reader is who follows "Try it on one machine" in docs/kubernetes.md: in the
// repository's folder, with a shell that remembers what was exported.
type reader struct {
	cluster          string // the name of a cluster of the test's own
	kubeconfig, path string
}

// shown is what a reader sees after a command, beside that it succeeds. Who is asked
// again looks again.
var shown = map[string]*regexp.Regexp{
	"kubectl assay check --pre":        regexp.MustCompile(`(?m)^\d+ ok, \d+ warn, 0 fail$`),
	"kubectl assay edges":              regexp.MustCompile(`(?m)^try/client\s.*\stry/server\s.*\shttp1\s+mtls\s`),
	"kubectl logs outsider":            regexp.MustCompile(`FAILED .* connection reset by peer`),
	"kubectl assay edges --exceptions": regexp.MustCompile(`(?m)^\(outside\)\s.*\stry/server\s.*plaintext: plaintext-in-strict`),
}

// TestTry types every command, and finds what the comments promise; the client, which
// asks all the time, never notices.
func TestTry(t *testing.T) {
	kubernetes.Require(t)
	before := machineState(t, "none")
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Try it on one machine\n")
	_, block, _ := strings.Cut(section, "```sh\n")
	block, _, found := strings.Cut(block, "```\n")
	if !found {
		t.Fatal("docs/kubernetes.md has no block of commands under «Try it on one machine»")
	}
	r := &reader{cluster: fmt.Sprintf("try-%d", os.Getpid()), path: os.Getenv("PATH")}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := r.run(context.Background(), "kubectl get pods -A -o wide; kubectl get events -A; kubectl describe pods -n default")
			t.Logf("%s", out)
		}
		r.run(context.Background(), "go run ./test/kubernetes/cluster down")
	})
	for line := range strings.Lines(block) {
		command, _, _ := strings.Cut(line, " #")
		command = strings.TrimSpace(command)
		if strings.HasPrefix(command, "kubectl assay uninstall") {
			// Before the server was there it could not be asked.
			out := r.must(t, "kubectl -n try logs deployment/client")
			if _, since, served := strings.Cut(out, "\nanswered "); !served || strings.Contains(since, "FAILED") {
				t.Errorf("the client noticed:\n%s", out)
			}
		}
		r.follow(t, command)
		if t.Failed() {
			return
		}
	}
	sameAs(t, before, r.cluster)
}

// follow types one command and looks at what it shows.
func (r *reader) follow(t *testing.T, command string) {
	t.Helper()
	switch want := shown[command]; {
	case command == "export KUBECONFIG=… PATH=…": // what up has printed
	case command == "export PATH=$PWD/bin:$PATH":
		root, err := filepath.Abs("../..")
		if err != nil {
			t.Fatal(err)
		}
		r.path = filepath.Join(root, "bin") + ":" + r.path
	case want != nil:
		lab.Eventually(t, 2*time.Minute, command, func() error {
			out, err := r.run(t.Context(), command)
			if err == nil && !want.MatchString(out) {
				err = fmt.Errorf("nothing matches %s in\n%s", want, out)
			}
			return err
		})
	default:
		out := r.must(t, command)
		if kubeconfig, path, ok := exported(out); ok {
			r.kubeconfig, r.path = kubeconfig, path+":"+r.path
		}
	}
}

// exported is what `up` tells a shell.
func exported(out string) (kubeconfig, path string, ok bool) {
	found := regexp.MustCompile(`export KUBECONFIG=(\S+)\n\s+export PATH=(\S+):\$PATH`).FindStringSubmatch(out)
	if found == nil {
		return "", "", false
	}
	return found[1], found[2], true
}

func (r *reader) must(t *testing.T, command string) string {
	t.Helper()
	out, err := r.run(t.Context(), command)
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

func (r *reader) run(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Minute) // the first one may compile a Kubernetes
	defer cancel()
	if strings.Contains(command, "/cluster ") {
		command += " --name " + r.cluster
	}
	cmd := exec.CommandContext(ctx, "bash", "-c", command)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "PATH="+r.path, "KUBECONFIG="+r.kubeconfig)
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	return string(out), err
}
