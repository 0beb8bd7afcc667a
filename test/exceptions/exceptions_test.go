package exceptions

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/test/lab"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

const config = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec:
  mode: %s
  excludedPorts: [%s]
`

// world is a mesh with a client, a server, and a host outside.
type world struct {
	*lab.World
	t              *testing.T
	client, server *lab.Workload
	outside        *lab.Node
}

func newWorld(t *testing.T, mode string) *world {
	lab.Require(t, "ip", "nft", "getent", "curl")
	l := lab.New(t)
	l.Dir(t, "/tmp/intent", "root")
	l.Write(t, "/tmp/intent/mesh.yaml", fmt.Sprintf(config, mode, "7000"))
	w := &world{World: &lab.World{Lab: l, Mode: lab.Meshed}, t: t}
	w.Mesh = l.StartMesh(t, "--config", "/tmp/intent", "--metrics", "127.0.0.1:9181")
	t.Cleanup(func() { w.Mesh.Finish(t) })
	w.client, w.server = w.Workload(t, "web", lab.Spec{}), w.Workload(t, "ledger", lab.Spec{Ports: []int{8080}})
	w.outside = w.Node(t, "outside")
	return w
}

// datagram sends one of size bytes and waits for its echo.
func (w *world) datagram(from, to *lab.Space, addr netip.Addr, port int, size int) {
	w.t.Helper()
	var server, client net.PacketConn
	open := func(s *lab.Space, addr string) (c net.PacketConn) {
		w.t.Helper()
		if err := s.In(func() (err error) { c, err = net.ListenPacket("udp", addr); return err }); err != nil {
			w.t.Fatal(err)
		}
		return c
	}
	server = open(to, netip.AddrPortFrom(addr, uint16(port)).String())
	defer server.Close()
	client = open(from, ":0")
	defer client.Close()
	b := make([]byte, size+1)
	if _, err := client.WriteTo(b[:size], server.LocalAddr()); err != nil {
		w.t.Fatal(err)
	}
	server.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, back, err := server.ReadFrom(b)
	if err != nil || n != size {
		w.t.Fatalf("%d bytes, %v", n, err)
	}
	server.WriteTo(b[:n], back)
	client.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, _, err = client.ReadFrom(b); err != nil || n != size {
		w.t.Fatalf("the answer: %d bytes, %v", n, err)
	}
}

func (w *world) edges() []assay.Edge {
	w.t.Helper()
	var list []assay.Edge
	w.Mesh.Get(w.t, "edges", &list)
	return list
}

// edge waits for an edge that ok accepts.
func (w *world) edge(what string, ok func(e assay.Edge) bool) assay.Edge {
	w.t.Helper()
	var found assay.Edge
	lab.Eventually(w.t, 20*time.Second, what, func() error {
		list := w.edges()
		for _, e := range list {
			if ok(e) {
				found = e
				return nil
			}
		}
		text, _ := json.Marshal(list)
		return fmt.Errorf("not among %s", text)
	})
	return found
}

// balance waits until the link of every workload is explained to the last byte and
// web's is as ok wants it, and returns that.
func (w *world) balance(ok func(web *assay.Balance) bool) *assay.Balance {
	w.t.Helper()
	var web *assay.Balance
	lab.Eventually(w.t, 20*time.Second, "every byte is explained", func() error {
		var list []api.SignalsView
		w.Mesh.Get(w.t, "signals", &list)
		for _, s := range list {
			b := s.Balance
			if b == nil || b.Problem != "" || b.In.Unexplained != 0 || b.Out.Unexplained != 0 {
				text, _ := json.Marshal(b)
				return fmt.Errorf("%s: %s", s.Name, text)
			}
			if !b.In.Adds() || !b.Out.Adds() {
				text, _ := json.Marshal(b)
				return fmt.Errorf("%s does not add up: %s", s.Name, text)
			}
			if s.Name == "web" {
				web = b
			}
		}
		if web == nil || !ok(web) {
			text, _ := json.Marshal(web)
			return fmt.Errorf("web: %s", text)
		}
		return nil
	})
	return web
}

func (w *world) check() (assay.Finding, map[string]assay.Finding, int) {
	w.t.Helper()
	r := w.Mesh.CLI(w.t, "check", "-o", "json")
	var list []assay.Finding
	if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil {
		w.t.Fatalf("assay check: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	kinds := map[string]assay.Finding{}
	for _, f := range list {
		kinds[f.Kind] = f
	}
	return kinds["exceptions"], kinds, r.Code
}

func echo(c *net.TCPConn) { io.Copy(c, c); c.CloseWrite() }

func TestExceptionsAreListed(t *testing.T) {
	for _, mode := range []string{"observe", "strict"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t, mode)
			w.listed(mode)
		})
	}
}

func (w *world) listed(mode string) {
	t := w.t
	// What the proxies carry is no exception, names neither.
	w.server.Serve(t, 8080, echo)
	to := w.AwaitService(t, w.client, "ledger", 8080)
	c := w.client.MustDial(t, to)
	go func() { c.Write(make([]byte, 4<<20)); c.CloseWrite() }()
	if n, err := io.Copy(io.Discard, c); err != nil || n != 4<<20 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	c.Close()
	if len(w.client.Resolve(t, "outside")) == 0 {
		t.Fatal("names outside do not resolve")
	}
	b := w.balance(func(b *assay.Balance) bool { return b.Out.Proxy.Bytes > 4<<20 && b.In.Proxy.Bytes > 4<<20 })
	if b.Out.Exceptions.Bytes != 0 || b.In.Exceptions.Bytes != 0 {
		t.Errorf("without any exception: %+v", *b)
	}
	if e, _, _ := w.check(); e.Kind != "" {
		t.Errorf("without any exception: %+v", e)
	}

	// UDP between workloads is one edge, with both identities, seen by both ends.
	w.datagram(w.client.Space, w.server.Space, w.server.IPv4, 5353, 1000)
	e := w.edge("UDP between workloads", func(e assay.Edge) bool { return e.Reason == assay.ReasonUDP && len(e.SeenBy) == 2 })
	if e.Client.Identity.Account != "web" || e.Server.Identity.Account != "ledger" || e.Port != 5353 || e.Protocol != assay.UDP || e.Security != assay.Plaintext ||
		e.PacketsUp != 1 || e.PacketsDown != 1 || e.BytesUp != 1042 || e.BytesDown != 1042 || e.Remote != "" || e.Client.Artifacts == "" || e.Server.Artifacts == "" {
		t.Errorf("%+v", e)
	}
	// To and from outside it says where.
	w.datagram(w.client.Space, w.outside.Space, w.outside.IPv4, 1514, 3000)
	w.edge("UDP to outside", func(e assay.Edge) bool {
		return e.Client.Identity.Account == "web" && e.Reason == assay.ReasonUDP && e.Remote == w.outside.IPv4.String() && e.Port == 1514
	})
	// Excluded ports, to a workload and to outside.
	w.server.Serve(t, 7000, echo)
	w.outside.Serve(t, 7000, echo)
	for _, addr := range []netip.Addr{w.server.IPv6, w.outside.IPv4} {
		c := w.client.MustDial(t, netip.AddrPortFrom(addr, 7000))
		go func() { c.Write(make([]byte, 1<<20)); c.CloseWrite() }()
		if n, err := io.Copy(io.Discard, c); err != nil || n != 1<<20 {
			t.Fatalf("%s: %d bytes, %v", addr, n, err)
		}
		c.Close()
	}
	e = w.edge("an excluded port between workloads", func(e assay.Edge) bool { return e.Reason == assay.ReasonExcluded && len(e.SeenBy) == 2 })
	if e.Port != 7000 || e.Client.Identity.Account != "web" || e.BytesUp < 1<<20 || e.BytesDown < 1<<20 {
		t.Errorf("%+v", e)
	}
	w.edge("an excluded port outside", func(e assay.Edge) bool {
		return e.Reason == assay.ReasonExcluded && e.Remote == w.outside.IPv4.String()
	})
	// SCTP by hand: the kernel need not have it.
	if err := w.client.In(func() error {
		return sendRaw(unix.IPPROTO_SCTP, w.server.IPv4, append([]byte{0x30, 0x39, 0x0b, 0x59, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20}, make([]byte, 16)...))
	}); err != nil {
		t.Fatal(err)
	}
	w.edge("SCTP", func(e assay.Edge) bool {
		return e.Reason == assay.ReasonSCTP && e.Port == 2905 && e.Server.Identity.Account == "ledger"
	})

	after := w.balance(func(b *assay.Balance) bool { return b.Out.Exceptions.Bytes > 2<<20 && b.In.Exceptions.Bytes > 2<<20 })
	f, kinds, code := w.check()
	if code != 2 || !strings.Contains(f.Detail, "excluded-port") || !strings.Contains(f.Detail, "udp") || !strings.Contains(f.Detail, "sctp") {
		t.Errorf("check exits with %d: %+v", code, kinds)
	}
	for _, kind := range []string{"unexplained-bytes", "capture-escaped", "not-metered", "plaintext"} {
		if f, ok := kinds[kind]; ok {
			t.Errorf("check: %+v", f)
		}
	}
	metrics := w.MustExec(t, "curl", "-sS", "http://127.0.0.1:9181/metrics")
	for _, want := range []string{`reason="udp",remote="` + w.outside.IPv4.String() + `",way="out"`, `assay_exception_bytes_total{`, `part="proxy"`, `assay_link_unexplained_bytes{`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	text := w.MustExec(t, w.Mesh.Assay, "describe", "workload", "web")
	if !strings.Contains(text, "exceptions") || !strings.Contains(text, "unexplained: 0 bytes in, 0 bytes out") {
		t.Errorf("describe:\n%s", text)
	}
	// An agent that comes back goes on counting where the last one ended.
	w.Mesh.Up.Kill()
	w.Mesh.Start(t)
	w.datagram(w.client.Space, w.outside.Space, w.outside.IPv4, 1515, 100)
	w.edge("UDP after the agent's death", func(e assay.Edge) bool {
		return e.Client.Identity.Account == "web" && e.Remote == w.outside.IPv4.String() && e.Port == 1515
	})
	if again := w.balance(func(b *assay.Balance) bool { return b.Out.Exceptions.Bytes >= after.Out.Exceptions.Bytes+142 }); !again.Since.Equal(after.Since) {
		t.Errorf("after the agent's death %+v, before %+v", again, after)
	}
}

func sendRaw(protocol int, to netip.Addr, payload []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, payload, 0, &unix.SockaddrInet4{Addr: to.As4()})
}

// TestAvoidingTheCapture: a process with more rights than `assay run` gives sends what
// no rule leads to the proxy. It is seen.
func TestAvoidingTheCapture(t *testing.T) {
	w := newWorld(t, "observe")
	w.balance(func(*assay.Balance) bool { return true })
	segment := append([]byte{0x30, 0x39, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, 0x10, 0xff, 0xff, 0, 0, 0, 0}, bytes.Repeat([]byte("x"), 1000)...)
	if err := w.client.In(func() error {
		for range 30 {
			if err := sendRaw(unix.IPPROTO_TCP, w.server.IPv4, segment); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// Segments of no connection, or of one that nobody captured.
	lab.Eventually(t, 20*time.Second, "raw TCP is found", func() error {
		_, kinds, _ := w.check()
		if _, ok := kinds["capture-escaped"]; !ok {
			return fmt.Errorf("check: %+v", kinds)
		}
		return nil
	})
	w.balance(func(b *assay.Balance) bool { return b.Out.Exceptions.Bytes > 30_000 })

	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45}, make([]byte, 1400)...)
	if err := w.client.In(func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
		for range 50 {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6}); err != nil && err != syscall.ENOBUFS {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 20*time.Second, "frames beside all rules are found", func() error {
		_, kinds, code := w.check()
		f, ok := kinds["unexplained-bytes"]
		if !ok || code != 2 || !strings.Contains(f.Detail, fmt.Sprint(50*len(frame))) || !strings.HasSuffix(f.Subject, "/web") {
			return fmt.Errorf("check exits with %d: %+v", code, kinds)
		}
		return nil
	})
}
