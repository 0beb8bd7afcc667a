package inject

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestHostileQuestion: what a question makes control hold has a bound near that of its size.
func TestHostileQuestion(t *testing.T) {
	list := func(what string, bound int) string {
		return "[" + strings.TrimSuffix(strings.Repeat(what+",", bound/(len(what)+1)), ",") + "]"
	}
	pod := func(containers string) string {
		return question("CREATE", "pods", "shop", `{"metadata":{},"spec":{"containers":`+containers+`}}`)
	}
	room := maxReview - 1024
	for name, body := range map[string]string{
		"containers":          pod(list("{}", room)),
		"null":                pod(list("null", room)),
		"numbers":             pod(list("1", room)),
		"the most containers": pod(list("{}", (maxElements-64)*3/2)),
		"environment":         pod(`[{"name":"a","env":` + list("{}", room) + `}]`),
		"lists of lists":      pod(`[{"name":"a","ports":` + list(`{"a":[]}`, room) + `}]`),
		"deep":                pod(strings.Repeat("[", room/2) + strings.Repeat("]", room/2)),
		"strings":             pod(list(`{"name":"\",\"[{"}`, room)),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := injector().answer([]byte(body), slog.New(slog.DiscardHandler))
		runtime.ReadMemStats(&after)
		used := after.TotalAlloc - before.TotalAlloc
		t.Logf("%s: %d MiB for %d KiB", name, used>>20, len(body)>>10)
		if used > 48<<20 {
			t.Errorf("%s: %d MiB for %d KiB", name, used>>20, len(body)>>10)
		}
		if (err != nil) != (name != "the most containers") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBusy: a question that finds no room is to be asked again, and a source has only its share.
func TestBusy(t *testing.T) {
	w := newWebhook(injector(), slog.New(slog.DiscardHandler))
	w.patience = 0
	server := httptest.NewServer(w)
	defer server.Close()
	pod := question("CREATE", "pods", "shop", `{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)
	post := func() *http.Response {
		t.Helper()
		resp, err := http.Post(server.URL+Path, "application/json", strings.NewReader(pod))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	for range maxAnswers {
		w.answers <- struct{}{}
	}
	if resp := post(); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("while others are answered: %s", resp.Status)
	}
	for range maxAnswers {
		<-w.answers
	}
	if resp := post(); resp.StatusCode != http.StatusOK {
		t.Errorf("after that: %s", resp.Status)
	}

	source := sourceOf("127.0.0.1:1")
	if !w.bodies.take(source, maxBodiesFrom) {
		t.Fatal("bodies have not been given back")
	}
	if resp := post(); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a source with all of its share: %s", resp.Status)
	}
	w.bodies.give(source, maxBodiesFrom)
	if !w.bodies.take(sourceOf("192.0.2.1:1"), maxBodiesFrom) {
		t.Error("one source has the share of others")
	}
	if resp := post(); resp.StatusCode != http.StatusOK {
		t.Errorf("beside another with all of its share: %s", resp.Status)
	}
}

// TestBounded: a source has so many connections, and one that ends makes room.
func TestBounded(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Bounded(inner)
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	var open []net.Conn
	for range maxFrom {
		dial()
		open = append(open, <-accepted)
	}
	more := dial()
	more.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := more.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("one too many is not closed")
	}
	for range 2 {
		open[0].Close() // twice is once
	}
	dial()
	open[0] = <-accepted
	if n := l.(*bounded).open.all; n != maxFrom {
		t.Errorf("%d connections are counted", n)
	}
	for _, conn := range open {
		conn.Close()
	}
}

// TestSources: a machine is one source, whatever addresses of its network it uses.
func TestSources(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.1:5": "192.0.2.1", "[::ffff:192.0.2.1]:5": "192.0.2.1", "[2001:db8::1:2:3:4]:5": "2001:db8::", "[fe80::1%eth0]:5": "fe80::", "x": "invalid IP",
	} {
		if got := sourceOf(remote).String(); got != want {
			t.Errorf("%s is of %s, want %s", remote, got, want)
		}
	}
}

// FuzzMeasure: no body ends it, and what is short is never too much.
func FuzzMeasure(f *testing.F) {
	f.Add([]byte(`{"a":["\\",{"b":"\"["}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if err := measure(body); err != nil && len(body) < maxDepth && !bytes.Contains(body, []byte(",")) {
			t.Errorf("%q: %v", body, err)
		}
	})
}
