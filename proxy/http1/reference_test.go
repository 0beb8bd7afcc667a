package http1

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The references are other readers of requests: net/http's server, and nginx where it
// is installed. Whatever we carry, they must read as the same messages, or refuse.

// seen is a request as somebody read it, whole.
type seen struct{ method, target, body string }

func (s seen) String() string { return fmt.Sprintf("%s %s %.60q", s.method, s.target, s.body) }

// ours is the reading of the engine, by the parser that it consists of. carried are the
// bytes that go to the application.
func ours(text []byte) (list []seen, carried []byte, refusal *Refusal) {
	sizes, rest, refusal := read(text, 1<<20)
	at := 0
	take := func(size int) []byte {
		for bytes.HasPrefix(text[at:], []byte("\r\n")) {
			at += 2
		}
		m := text[at : at+size]
		carried = append(carried, m...)
		at += size
		return m
	}
	for _, size := range sizes {
		m := take(size)
		var r Request
		r.Parse(m, &limits)
		list = append(list, seen{string(r.Method), string(r.Target), bodyOf(m[r.Size:], r.Chunked)})
	}
	if rest > 0 {
		take(rest)
	}
	return list, carried, refusal
}

// bodyOf returns the data of a body that is valid.
func bodyOf(b []byte, chunked bool) string {
	if !chunked {
		return string(b)
	}
	var data []byte
	for {
		i := bytes.Index(b, []byte("\r\n"))
		n := 0
		for _, c := range b[:i] {
			d, ok := unhex(c)
			if !ok {
				break
			}
			n = n<<4 | int(d)
		}
		if n == 0 {
			return string(data)
		}
		data = append(data, b[i+2:i+2+n]...)
		b = b[i+2+n+2:]
	}
}

// compare holds a reference's reading of what we carry against ours.
func compare(t testing.TB, who string, mine, theirs []seen, carried []byte) {
	t.Helper()
	for i, s := range theirs {
		if i == len(mine) {
			t.Fatalf("%s reads a message more: %v\nin %q", who, s, carried)
		}
		if s != mine[i] {
			t.Fatalf("%s reads message %d as %v\nwe as %v\nin %q", who, i, s, mine[i], carried)
		}
	}
}

// netHTTP is net/http's server.
type netHTTP struct {
	server *http.Server
	lines  lines
	mu     sync.Mutex
	seen   []seen
}

func newNetHTTP(t testing.TB) *netHTTP {
	r := &netHTTP{lines: lines{make(chan net.Conn), make(chan struct{})}}
	r.server = &http.Server{Handler: r, DisableGeneralOptionsHandler: true, MaxHeaderBytes: 1 << 20, ErrorLog: log.New(io.Discard, "", 0)}
	var running sync.WaitGroup
	running.Go(func() { r.server.Serve(r.lines) })
	t.Cleanup(func() { r.server.Close(); running.Wait() })
	return r
}

func (r *netHTTP) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, seen{q.Method, q.RequestURI, string(body)})
}

func (r *netHTTP) read(t testing.TB, text []byte) []seen {
	c := &line{text: bytes.NewReader(text), over: make(chan struct{})}
	r.lines.next <- c
	<-c.over
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.seen
	r.seen = nil
	return list
}

// line is a connection that has bytes to read and then its end.
type line struct {
	net.Conn
	text *bytes.Reader
	once sync.Once
	over chan struct{}
}

func (c *line) Read(p []byte) (int, error)       { return c.text.Read(p) }
func (c *line) Write(p []byte) (int, error)      { return len(p), nil }
func (c *line) Close() error                     { c.once.Do(func() { close(c.over) }); return nil }
func (c *line) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *line) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *line) SetDeadline(time.Time) error      { return nil }
func (c *line) SetReadDeadline(time.Time) error  { return nil }
func (c *line) SetWriteDeadline(time.Time) error { return nil }

type lines struct {
	next chan net.Conn
	over chan struct{}
}

func (l lines) Accept() (net.Conn, error) {
	select {
	case c := <-l.next:
		return c, nil
	case <-l.over:
		return nil, net.ErrClosed
	}
}
func (l lines) Close() error   { close(l.over); return nil }
func (l lines) Addr() net.Addr { return &net.TCPAddr{} }

// nginx reads requests and passes them on to back, normalised.
type nginx struct {
	front string
	back  *http.Server
	mu    sync.Mutex
	seen  []seen
}

const nginxConfig = `
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log error.log crit;
events { worker_connections 256; }
http {
	access_log off; client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
	client_max_body_size 0; client_header_buffer_size 128k; large_client_header_buffers 4 128k; client_body_buffer_size 1m;
	ignore_invalid_headers off; underscores_in_headers on; keepalive_requests 1000000; lingering_close off; merge_slashes off;
	server {
		listen unix:front.sock;
		server_name _;
		location / {
			proxy_pass http://unix:back.sock; proxy_http_version 1.1; proxy_ignore_client_abort on; proxy_pass_request_headers off;
			proxy_set_header Host x; proxy_set_header X-Method $request_method; proxy_set_header X-Target $request_uri;
		}
	}
}
`

// newNginx starts one, or returns nil where there is none.
func newNginx(t testing.TB) *nginx {
	path, err := exec.LookPath("nginx")
	if err != nil {
		t.Log("nginx is not installed: it is no reference here")
		return nil
	}
	dir, err := os.MkdirTemp("", "assay-nginx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "nginx.conf")
	config := strings.NewReplacer("front.sock", dir+"/front.sock", "back.sock", dir+"/back.sock", "nginx.pid", dir+"/nginx.pid", " tmp;", " "+dir+"/tmp;", "error.log", dir+"/error.log").Replace(nginxConfig)
	if err := os.WriteFile(conf, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	n := &nginx{front: dir + "/front.sock"}
	l, err := net.Listen("unix", dir+"/back.sock")
	if err != nil {
		t.Fatal(err)
	}
	n.back = &http.Server{Handler: n, ErrorLog: log.New(io.Discard, "", 0)}
	var running sync.WaitGroup
	running.Go(func() { n.back.Serve(l) })
	cmd := exec.Command(path, "-p", dir, "-c", conf, "-e", dir+"/error.log")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		n.back.Close()
		running.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("unix", n.front)
		if err == nil {
			c.Close()
			return n
		}
		if time.Now().After(deadline) {
			said, _ := os.ReadFile(dir + "/error.log")
			t.Fatalf("nginx does not start: %v\n%s", err, said)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// version is "1.22.1" of nginx/1.22.1.
func (n *nginx) version(t testing.TB) string {
	out, err := exec.Command("nginx", "-v").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	_, v, _ := strings.Cut(strings.Fields(string(out))[2], "/")
	return v
}

func (n *nginx) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen = append(n.seen, seen{q.Header.Get("X-Method"), q.Header.Get("X-Target"), string(body)})
}

func (n *nginx) read(t testing.TB, text []byte) []seen {
	c, err := net.Dial("unix", n.front)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	go func() { // it may stop reading while it writes
		c.Write(text)
		c.(*net.UnixConn).CloseWrite()
	}()
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%v\nof %q", err, text)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.seen
	n.seen = nil
	return list
}

// asNginx is a message as nginx shows it: without scheme and authority. What it does
// not pass on (CONNECT, TRACE) it refuses.
func asNginx(list []seen) []seen {
	list = append([]seen(nil), list...)
	for i, s := range list {
		if _, rest, ok := strings.Cut(s.target, "://"); ok && s.target[0] != '/' {
			j := strings.IndexAny(rest, "/?")
			if j < 0 {
				rest, j = "/", 0
			}
			list[i].target = rest[j:]
			if list[i].target[0] == '?' {
				list[i].target = "/" + list[i].target
			}
		}
	}
	return list
}

// FuzzReferences compares what we make of any bytes with what the references make of
// those that we carry.
func FuzzReferences(f *testing.F) {
	for _, file := range []string{"rfc-requests", "smuggling-requests"} {
		for _, m := range messages(f, file) {
			if b := m.bytes(); len(b) < 8192 {
				f.Add(b)
			}
		}
	}
	f.Add(append(bytes.Clone(browser), browser...))
	goes := newNetHTTP(f)
	other := newNginx(f)
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 32<<10 {
			return
		}
		mine, carried, _ := ours(text)
		if len(carried) == 0 {
			return
		}
		compare(t, "net/http", mine, goes.read(t, carried), carried)
		if other != nil {
			compare(t, "nginx", asNginx(mine), other.read(t, carried), carried)
		}
	})
}

// TestReferencesAccept holds the table of docs/http1.md: what we refuse and a reference
// reads is where we are stricter, on purpose.
func TestReferencesAccept(t *testing.T) {
	goes, other := newNetHTTP(t), newNginx(t)
	type row struct{ goes, other string }
	accepted := map[string]*row{}
	var order []string
	for _, m := range messages(t, "smuggling-requests") {
		_, reason := m.refused()
		if reason == "" {
			continue
		}
		mine, _, _ := ours(m.bytes())
		note := func(list []seen, of func(*row) *string) {
			if len(list) <= len(mine) {
				return
			}
			r := accepted[reason]
			if r == nil {
				r = &row{}
				accepted[reason] = r
				order = append(order, reason)
			}
			cell := of(r)
			if *cell != "" {
				*cell += "; "
			}
			*cell += m.name
		}
		note(goes.read(t, m.bytes()), func(r *row) *string { return &r.goes })
		if other != nil {
			note(other.read(t, m.bytes()), func(r *row) *string { return &r.other })
		}
	}
	if other == nil {
		t.Skip("the table needs nginx")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| refused here | net/http reads | nginx %s reads |\n|---|---|---|\n", other.version(t))
	for _, reason := range order {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", reason, accepted[reason].goes, accepted[reason].other)
	}
	documented(t, "references", b.String(), func(had string) bool {
		return !strings.Contains(had, "nginx "+other.version(t)+" reads") // another version's table
	})
}
