package http2

import (
	"bufio"
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
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev/proxy/mux"
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
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, bin, "--strict", "-h", host, "-p", port, "-j", junit, "-o", "30").CombinedOutput()
	if err != nil {
		t.Logf("h2spec: %v\n%s", err, out)
	}
	judge(t, junit, 140)
}

// TestH2specClient has h2spec's servers examine what the application itself meets: each
// of them waits for a request and then breaks a rule. They are not told of a client to
// start, as they would give that three seconds: this test makes the requests.
func TestH2specClient(t *testing.T) {
	bin := tool(t, "h2specd")
	w := newWorld(t, "127.0.0.1:1", func(w *world) { w.elsewhere, w.dispatcher = true, once{w} })
	// Its ports are fixed, its address is not: there are 16 million.
	const first, cases = 20000, 57
	host := fmt.Sprintf("127.%d.%d.%d", 100+rand.IntN(100), rand.IntN(256), 1+rand.IntN(250))
	cmd := exec.Command(bin, "--strict", "-h", host, "-p", strconv.Itoa(first-1), "-f", strconv.Itoa(first), "-o", "30")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1000)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
	})
	defer func() { cmd.Process.Kill(); reading.Wait(); cmd.Wait() }()
	var said strings.Builder
	await := func(marks ...string) (line string) {
		t.Helper()
		for limit := time.After(patience); ; {
			select {
			case line, ok := <-lines:
				if !ok {
					t.Fatalf("h2specd ended:\n%s", &said)
				}
				fmt.Fprintln(&said, line)
				for _, m := range marks {
					if strings.Contains(line, m) {
						return line
					}
				}
			case <-limit:
				t.Fatalf("h2specd does not say %q:\n%s", marks, &said)
			}
		}
	}
	await("BROWSER mode")
	seen := map[string]bool{}
	for port := first; port < first+cases; port++ {
		r := w.client()
		r.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/", ":authority", net.JoinHostPort(host, strconv.Itoa(port)))
		r.flush()
		said.Reset()
		if line := await("✔", "×"); strings.Contains(line, "×") {
			for range 4 { // what it expected
				if rest, ok := <-lines; ok {
					fmt.Fprintln(&said, rest)
				}
			}
			t.Errorf("port %d:\n%s", port, &said)
		}
		seen[said.String()] = true
		r.c.Close()
	}
	if len(seen) != cases {
		t.Errorf("%d cases, want %d", len(seen), cases)
	}
}

// once tries nothing again.
type once struct{ *world }

func (o once) Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error) {
	if x.Attempt > 0 {
		return mux.Stream{}, 0, ErrNoOther
	}
	return o.world.Dispatch(ctx, x, data, fin, h, batch, wait)
}
