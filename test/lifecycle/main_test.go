// Package lifecycle ends the parts of the mesh in every way while programs use
// it: control, agents and proxies are killed, certificates are renewed, starts are
// repeated. What runs must go on as the design says, and when all is over nothing
// may be left.
package lifecycle

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

const (
	portHTTP = 8080
	portEcho = 7000 // the server speaks first, then echoes
)

const greeting = "hello from the server\n"

// serve gives a workload the two services that the tests use.
func serve(t *testing.T, w *lab.Workload) {
	t.Helper()
	w.Serve(t, portEcho, func(c *net.TCPConn) {
		io.WriteString(c, greeting)
		io.Copy(c, c)
	})
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(rw, "%s %d\n", host, len(body))
	})}
	l := w.Listen(t, portHTTP)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
}

// pair is a server with both services and a client that has used them.
func pair(t *testing.T, w *lab.World) (client, server *lab.Workload) {
	t.Helper()
	server = w.Workload(t, "shop", lab.Spec{Ports: []int{portHTTP, portEcho}})
	client = w.Workload(t, "buyer", lab.Spec{})
	serve(t, server)
	w.AwaitService(t, client, "shop", portHTTP)
	w.AwaitService(t, client, "shop", portEcho)
	return client, server
}

// conversation is a connection to the echo service that stays open.
type conversation struct {
	c net.Conn
	r *bufio.Reader
	n int
}

func converse(client *lab.Workload, to netip.AddrPort) (*conversation, error) {
	c, err := client.Dial(to)
	if err != nil {
		return nil, err
	}
	v := &conversation{c: c, r: bufio.NewReader(c)}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if line, err := v.r.ReadString('\n'); err != nil || line != greeting {
		c.Close()
		return nil, fmt.Errorf("greeting %q: %w", line, errors.Join(err, errors.New("not the server's")))
	}
	return v, nil
}

func mustConverse(t *testing.T, client *lab.Workload, service string) *conversation {
	t.Helper()
	v, err := converse(client, client.Target(t, service, portEcho))
	if err != nil {
		t.Fatalf("a new connection to %s: %v", service, err)
	}
	t.Cleanup(func() { v.c.Close() })
	return v
}

// say sends a line and waits for its echo.
func (v *conversation) say() error {
	v.n++
	line := fmt.Sprintf("line %d\n", v.n)
	v.c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(v.c, line); err != nil {
		return err
	}
	got, err := v.r.ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("echo %q of %q", got, line)
	}
	return err
}

// request is one HTTP exchange on a connection.
func request(ctx context.Context, c net.Conn, r *bufio.Reader) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: shop\r\n\r\n"); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("body: %w", err)
	}
	if resp.StatusCode != 200 {
		return fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(body)))
	}
	return nil
}

// everything uses the service in all ways anew: its name, a new server-first
// connection, a new HTTP connection.
func everything(t *testing.T, client *lab.Workload) error {
	addrs := client.Resolve(t, "shop")
	if len(addrs) != 2 {
		return fmt.Errorf("shop resolves to %v", addrs)
	}
	for _, a := range addrs {
		v, err := converse(client, netip.AddrPortFrom(a, portEcho))
		if err != nil {
			return fmt.Errorf("new connection to %s: %w", a, err)
		}
		err = v.say()
		v.c.Close()
		if err != nil {
			return fmt.Errorf("conversation with %s: %w", a, err)
		}
		c, err := client.Dial(netip.AddrPortFrom(a, portHTTP))
		if err != nil {
			return fmt.Errorf("new connection to %s: %w", a, err)
		}
		err = request(t.Context(), c, bufio.NewReader(c))
		c.Close()
		if err != nil {
			return fmt.Errorf("request to %s: %w", a, err)
		}
	}
	return nil
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// load is clients that never stop; each failure is kept with its time.
type load struct {
	mu       sync.Mutex
	done     int
	failures []failure
	stop     context.CancelFunc
	ended    sync.WaitGroup
}

// failure is a request that failed, and on which workloads' proxies it relied. The dialling
// of its connection began at dialed.
type failure struct {
	dialed         time.Time
	began, ended   time.Time
	client, server string
	err            error
}

func (f failure) String() string {
	return fmt.Sprintf("%s (%s) %s -> %s: %v", f.ended.Format("15:04:05.000"), f.ended.Sub(f.began).Round(time.Millisecond), f.client, f.server, f.err)
}

// caller is one client of a load.
type caller struct {
	client *lab.Workload
	server string
	to     func() (netip.AddrPort, error)
	perC   int // requests on one connection
}

// start begins a load with these callers.
func startLoad(t *testing.T, callers ...caller) *load {
	ctx, stop := context.WithCancel(t.Context())
	l := &load{stop: stop}
	for _, c := range callers {
		l.ended.Add(2)
		go l.web(ctx, c)
		go l.talk(ctx, c)
	}
	t.Cleanup(func() { l.finish() })
	return l
}

// finish stops the load and returns what it did.
func (l *load) finish() (done int, failures []failure) {
	l.stop()
	l.ended.Wait()
	return l.done, l.failures
}

func (l *load) count(dialed, began time.Time, c caller, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.done++
		return
	}
	l.failures = append(l.failures, failure{dialed, began, time.Now(), c.client.Name, c.server, err})
}

func (l *load) soFar() (done, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.done, len(l.failures)
}

// web sends requests on kept connections.
func (l *load) web(ctx context.Context, c caller) {
	defer l.ended.Done()
	for ctx.Err() == nil {
		dialed := time.Now()
		to, err := c.to()
		var conn net.Conn
		if err == nil {
			conn, err = c.client.Dial(netip.AddrPortFrom(to.Addr(), portHTTP))
		}
		if err != nil {
			l.count(dialed, dialed, c, err)
			pause(ctx)
			continue
		}
		r := bufio.NewReader(conn)
		for range c.perC {
			began := time.Now()
			err := request(ctx, conn, r)
			l.count(dialed, began, c, err)
			if err != nil || ctx.Err() != nil {
				pause(ctx)
				break
			}
		}
		conn.Close()
	}
}

// talk holds long conversations.
func (l *load) talk(ctx context.Context, c caller) {
	defer l.ended.Done()
	for ctx.Err() == nil {
		dialed := time.Now()
		to, err := c.to()
		var v *conversation
		if err == nil {
			v, err = converse(c.client, netip.AddrPortFrom(to.Addr(), portEcho))
		}
		if err != nil {
			l.count(dialed, dialed, c, err)
			pause(ctx)
			continue
		}
		for err == nil && ctx.Err() == nil {
			began := time.Now()
			err = v.say()
			l.count(dialed, began, c, err)
			pause(ctx)
		}
		v.c.Close()
	}
}

// pause keeps a client from spinning, and its failures countable.
func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Millisecond):
	}
}

func descriptors(pid int) int {
	list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(list)
}
