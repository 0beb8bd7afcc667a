package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"assay.dev/test/lab"
)

// contender is one way from the client to the backend.
type contender struct {
	name    string
	client  *lab.Space   // where the client runs
	host    string       // whom it asks; the ports say for what
	addr    string       // the same without a name to look up
	peer    string       // the server side's address as the client's proxy dials it, for counting sockets
	proxies func() []int // the process numbers of both proxies
	idle    memory
	lacks   []string // kinds of points that it cannot have
}

// The ports that every application listens on, and every client asks.
const (
	portHTTP1 = 8081
	portHTTP2 = 8082 // without TLS, known beforehand
	portEcho  = 8083 // opaque bytes come back
	portGRPC  = 8084
)

func (c *contender) url(port int) string { return fmt.Sprintf("http://%s:%d", c.host, port) }

func (c *contender) has(kind string) bool { return !slices.Contains(c.lacks, kind) }

// The backend's answers.
const (
	smallBody = "0123456789012345678901234567890123456789012345678\n"
	bulkSize  = 1 << 20
)

// check asks for both bodies once: a contender that answers something else is
// not measured.
func (c *contender) check(r *run) {
	lab.Eventually(r, 10*time.Second, c.name+" answers", func() error {
		out, err := c.client.Try(r.ctx, "curl", "-sS", "--fail", "--max-time", "5", c.url(portHTTP1)+"/")
		if err == nil && out != smallBody {
			err = fmt.Errorf("answered %q", out)
		}
		return err
	})
	out := c.client.MustExec(r, "curl", "-sS", "--fail", "--max-time", "5", "-o", "/dev/null", "-w", "%{size_download}", c.url(portHTTP1)+"/1m")
	if out != fmt.Sprint(bulkSize) {
		r.Fatalf("%s: 1 MiB body has %s bytes", c.name, out)
	}
	for _, p := range wirePoints {
		if p.kind != kindHTTP2 && c.has(p.kind) {
			lab.Eventually(r, 10*time.Second, c.name+" answers "+p.kind, func() error {
				_, err := c.client.Try(r.ctx, p.client(r, c, 50*time.Millisecond)...)
				return err
			})
		}
	}
}

// warm lets pools fill and code page in.
func (c *contender) warm(r *run) {
	c.measure(r, load{path: "/", connections: 64, duration: 500 * time.Millisecond})
	c.measure(r, load{path: "/1m", connections: bulkConcurrency, duration: 300 * time.Millisecond})
}

// sockets counts the established connections between the proxies.
func (c *contender) sockets(r *run) int {
	if c.peer == "" {
		return 0
	}
	out, err := c.client.Try(r.ctx, "ss", "-Htn", "state", "established", "dst", c.peer)
	if err != nil {
		return 0
	}
	return strings.Count(out, "\n")
}

// backendCommand returns the arguments of the application: nginx, which answers 50 bytes
// and 1 MiB over HTTP/1.1 and HTTP/2, and beside it our own (app.go).
func backendCommand(r *run, l *lab.Lab, name string) []string {
	dir := l.Dir(r, "/tmp/"+name, "")
	l.Write(r, dir+"/www/1m", strings.Repeat("x", bulkSize))
	l.Write(r, dir+"/nginx.conf", fmt.Sprintf(`
worker_processes 1; daemon off; error_log stderr error; pid %[1]s/nginx.pid;
events { worker_connections 8192; }
http {
  access_log off; keepalive_requests 100000000; keepalive_timeout 300; sendfile on; tcp_nopush off;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  open_file_cache max=16;
  http2_max_concurrent_streams 1024;
  server { listen 8081 backlog=4096; listen [::]:8081 backlog=4096; listen 8082 http2 backlog=4096; listen [::]:8082 http2 backlog=4096; root %[1]s/www;
    location = / { default_type text/plain; return 200 "%[2]s"; }
  }
}`, dir, strings.ReplaceAll(smallBody, "\n", "\\n")))
	return []string{r.self, "serve", "nginx", "-p", dir, "-c", dir + "/nginx.conf"}
}

// tree returns the numbers of a process and all below it.
func tree(l *lab.Lab, pid int) []int {
	list := []int{pid}
	for _, p := range l.Children(pid) {
		list = append(list, p.PID)
	}
	return list
}

// once remembers what a pair consists of: workers come up shortly after their
// master, and then stay.
func once(find func() []int) func() []int {
	var found []int
	return func() []int {
		if found == nil {
			found = slices.Clone(find())
		}
		return found
	}
}

func newDirect(r *run, l *lab.Lab) *contender {
	client, server := l.Node(r, "direct-client"), l.Node(r, "direct-server")
	server.Start(r, backendCommand(r, l, "direct")...)
	return &contender{name: "direct", client: client.Space, host: server.IPv4.String(), proxies: func() []int { return nil }}
}
