package http2

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// tool builds one of h2spec's commands, whose version is pinned in tools/go.mod.
func tool(t *testing.T, name string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("builds and runs another program")
	}
	path := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("go", "build", "-o", path, "github.com/summerwind/h2spec/cmd/"+name)
	cmd.Dir = "../../tools"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return path
}

// report is h2spec's, in the form of JUnit.
type report struct {
	Suites []struct {
		Name  string `xml:"name,attr"`
		ID    string `xml:"id,attr"`
		Cases []struct {
			Package string `xml:"package,attr"`
			Name    string `xml:"classname,attr"`
			Failure *struct {
				Text string `xml:",innerxml"`
			} `xml:"failure"`
			Error *struct {
				Text string `xml:",innerxml"`
			} `xml:"error"`
			Skipped *struct{} `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

func judge(t *testing.T, path string, least int) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := xml.Unmarshal(raw, &r); err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
	n := 0
	for _, s := range r.Suites {
		for _, c := range s.Cases {
			switch {
			case c.Failure != nil:
				t.Errorf("%s: %s: %s", c.Package, c.Name, c.Failure.Text)
			case c.Error != nil:
				t.Errorf("%s: %s: %s", c.Package, c.Name, c.Error.Text)
			case c.Skipped != nil:
				t.Errorf("%s: %s: skipped", c.Package, c.Name)
			default:
				n++
			}
		}
	}
	t.Logf("%d cases passed", n)
	if n < least {
		t.Errorf("%d cases passed, want at least %d", n, least)
	}
}

// TestH2spec has h2spec examine what the application's clients meet.
func TestH2spec(t *testing.T) {
	bin := tool(t, "h2spec")
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "h2spec wants a body that is not tiny")
	})
	w := newWorld(t, app)
	host, port, _ := net.SplitHostPort(w.addr)
	junit := filepath.Join(t.TempDir(), "junit.xml")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, bin, "--strict", "-h", host, "-p", port, "-j", junit, "-o", "2").CombinedOutput()
	if err != nil {
		t.Logf("h2spec: %v\n%s", err, out)
	}
	judge(t, junit, 140)
}

// TestH2specClient has h2spec's servers examine what the application itself meets: each
// of them waits for a request and then breaks a rule.
func TestH2specClient(t *testing.T) {
	bin := tool(t, "h2specd")
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("no curl")
	}
	w := newWorld(t, "127.0.0.1:1", func(w *world) { w.elsewhere = true })
	// Its ports are fixed, its address is not: there are 16 million.
	host := fmt.Sprintf("127.%d.%d.%d", 100+rand.IntN(100), rand.IntN(256), 1+rand.IntN(250))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "--strict", "-h", host, "-f", "20000", "-o", "1",
		"-e", "curl -s --http2-prior-knowledge --max-time 2 --connect-to ::"+w.addr)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("h2specd: %v\n%s", err, out)
	}
	var said strings.Builder
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "use of closed network connection") { // it ends so
			said.WriteString(line)
		}
	}
	if strings.Contains(said.String(), "×") {
		t.Errorf("h2specd:\n%s", &said)
	}
	m := regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`).FindStringSubmatch(string(out))
	if m == nil {
		t.Fatalf("h2specd said:\n%s", out)
	}
	t.Log(m[0])
	if n, _ := strconv.Atoi(m[2]); n < 57 {
		t.Errorf("%d cases passed", n)
	}
}
