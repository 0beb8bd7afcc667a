package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

const (
	ownMark    = 0x41535301
	returnMark = 0x41535302
	domain     = "bank.test"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var (
	meshPrefixes = prefixes("10.181.0.0/16", "10.182.0.0/16", "fd5a:5a59::/64", "fd5a:5a59:1::/112")
	virtual      = prefixes("10.182.0.0/16", "fd5a:5a59:1::/112")
)

// world is one host with workloads, and the agent that serves their proxies.
type world struct {
	t    *testing.T
	host *netns.Host
	ca   *authority
	mesh []netip.Prefix // that are the mesh's own; none in a cluster

	mu        sync.Mutex
	workloads []*workload
	services  map[string]assay.Service
	routes    []assay.Route
	settings  assay.NamespaceConfig
	version   uint64
}

// workload is one of them, or (without a proxy) a machine beside the mesh.
type workload struct {
	assay.Workload
	w       *world
	n       int
	ns      *netns.Namespace
	capture *capture.Capture
	files   []*os.File // the listeners, which the agent keeps
	sock    *net.UnixListener
	cmd     *exec.Cmd
	log     *logWriter
	exited  chan struct{}

	mu       sync.Mutex
	conn     *link.Conn
	hello    link.Hello
	ack      link.Ack
	handed   int // listeners that came with the last Hello
	ready    int
	csrs     int
	refuse   string // what requests are answered with
	life     time.Duration
	renewAt  func(notAfter time.Time) time.Time
	identity assay.Identity // what certificates say; usually its own
	// probes and nodes are configured; kubelet says who is one. nil: nothing is answered.
	transition bool
	olderGrace time.Duration
	probes     []uint16
	metrics    uint16
	nodes      []netip.Addr
	kubelet    func(link.Probe) bool
	// published, when set, is who the mesh believes to be at its addresses.
	published assay.Identity
	reports   map[uint64]chan link.Report
	asked     uint64
	findings  []assay.Finding
}

var worlds atomic.Uint32

func newWorld(t *testing.T) *world {
	needLab(t)
	n := worlds.Add(1)
	w := &world{t: t, ca: newAuthority(t), mesh: meshPrefixes, services: map[string]assay.Service{}, version: 1}
	w.settings = assay.NamespaceConfig{Namespace: "bank", Mode: assay.Observe}
	w.host = &netns.Host{Bridge: fmt.Sprintf("asyprox%d", n), Prefixes: prefixes("10.181.7.0/24", "fd5a:5a59::7:0:0/80", "192.0.2.0/24"), Mesh: meshPrefixes}
	t.Cleanup(func() {
		if err := w.host.Remove(); err != nil {
			t.Error(err)
		}
	})
	if err := w.host.Setup(); err != nil {
		t.Fatal(err)
	}
	return w
}

// addr is the n-th machine's address. 192.0.2.0/24 is not the mesh's.
func addr4(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 181, 7, byte(2 + n)}) }
func addr6(n int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("fd5a:5a59::7:0:%x", 2+n))
}

// machine makes a namespace with addresses.
func (w *world) machine(name string, addrs ...netip.Addr) *workload {
	w.t.Helper()
	ns, err := netns.Create()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ns.Close() })
	w.mu.Lock()
	defer w.mu.Unlock()
	m := &workload{w: w, n: len(w.workloads), ns: ns, reports: map[uint64]chan link.Report{}}
	m.Workload = assay.Workload{ID: fmt.Sprintf("%s-%d", name, m.n), Namespace: "bank", Name: name, Addrs: addrs,
		Identity: assay.Identity{TrustDomain: domain, Namespace: "bank", Account: name}}
	m.identity = m.Identity
	m.life = time.Hour
	if err := w.host.Attach(ns, w.host.Port(uint32(m.n)), addrs); err != nil {
		w.t.Fatal(err)
	}
	w.workloads = append(w.workloads, m)
	return m
}

// outsider is a machine without a proxy, outside the mesh's networks.
func (w *world) outsider() *workload {
	return w.machine("outsider", netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 100+len(w.workloads))))
}

// workload makes a machine with listeners, capture and a proxy, and waits until the
// proxy has a certificate.
func (w *world) workload(name string) *workload {
	w.t.Helper()
	m := w.prepare(name)
	m.start()
	m.awaitCertificate()
	return m
}

// prepare does everything but start the proxy.
func (w *world) prepare(name string) *workload {
	w.t.Helper()
	m := w.bare(name)
	m.capturing()
	m.MeshedSince = time.Now()
	w.publish()
	return m
}

// bare is a machine with the addresses of a workload.
func (w *world) bare(name string) *workload {
	w.t.Helper()
	return w.machine(name, addr4(len(w.workloads)), addr6(len(w.workloads)))
}

// capturing gives a machine listeners and rules.
func (m *workload) capturing() {
	w := m.w
	w.t.Helper()
	var ports []uint16
	m.do(func() error {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		for range 2 {
			l, err := lc.Listen(context.Background(), "tcp", "[::]:0")
			if err != nil {
				return err
			}
			ports = append(ports, l.Addr().(*net.TCPAddr).AddrPort().Port())
			m.keep(l.(*net.TCPListener))
		}
		u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 153), Port: 53})
		if err != nil {
			return err
		}
		m.keep(u)
		l, err := lc.Listen(context.Background(), "tcp", "127.0.0.153:53")
		if err != nil {
			return err
		}
		m.keep(l.(*net.TCPListener))
		return nil
	})
	m.capture = capture.New(m.ns)
	if err := m.capture.Install(capture.Rules{OutboundPort: ports[0], InboundPort: ports[1], OwnMark: ownMark, ReturnMark: returnMark, Virtual: virtual}, nil); err != nil {
		w.t.Fatal(err)
	}
	m.listenAgent()
}

func (m *workload) keep(l interface {
	File() (*os.File, error)
	Close() error
}) {
	f, err := l.File()
	l.Close()
	if err != nil {
		m.w.t.Fatal(err)
	}
	m.files = append(m.files, f)
	m.w.t.Cleanup(func() { f.Close() })
}

func (m *workload) listenAgent() {
	path := filepath.Join(os.Getenv("ASSAY_TEST_DIR"), fmt.Sprintf("agent-%d-%d.sock", worlds.Load(), m.n))
	sock, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		m.w.t.Fatal(err)
	}
	os.Chmod(path, 0o777)
	m.sock = sock
	m.w.t.Cleanup(func() { sock.Close() })
}

func (m *workload) do(fn func() error) {
	m.w.t.Helper()
	if err := m.ns.Do(fn); err != nil {
		m.w.t.Fatal(err)
	}
}

var roles = []string{link.ListenOutbound, link.ListenInbound, link.ListenDNSUDP, link.ListenDNSTCP}

// start starts the proxy and speaks with it as an agent does.
func (m *workload) start() {
	t := m.w.t
	t.Helper()
	conn, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	m.cmd = proxyCommand(m.n)
	m.cmd.ExtraFiles = []*os.File{far}
	m.log = &logWriter{}
	m.cmd.Stderr = m.log
	m.do(m.cmd.Start)
	m.exited = make(chan struct{})
	cmd, exited := m.cmd, m.exited
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			cmd.Process.Signal(syscall.SIGQUIT)
			<-exited
			t.Errorf("%s: proxy did not end in time", m.ID)
		}
		if code := cmd.ProcessState.ExitCode(); code > 0 { // -1: the test killed it
			t.Errorf("%s: proxy exited with %d", m.ID, code)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", m.ID, m.log)
		}
	})
	m.speak(conn, true)
}

// restart starts another proxy after the first one was killed.
func (m *workload) restart() {
	m.mu.Lock()
	m.ready, m.ack = 0, link.Ack{}
	m.mu.Unlock()
	m.start()
	m.awaitCertificate()
}

// speakAgain is the next agent's side.
func (m *workload) speakAgain(conn *link.Conn) { m.speak(conn, false) }

// speak follows a link, from its Hello on, in a goroutine.
func (m *workload) speak(conn *link.Conn, first bool) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.follow(conn, first)
	}()
	m.w.t.Cleanup(func() { conn.Close(); <-done })
}

func (m *workload) follow(conn *link.Conn, first bool) {
	for {
		msg, err := conn.Receive()
		if err != nil {
			m.mu.Lock()
			if m.conn == conn {
				m.conn = nil
			}
			m.mu.Unlock()
			return
		}
		switch msg.Kind {
		case link.KindHello:
			m.mu.Lock()
			m.hello = link.Hello{}
			msg.Decode(&m.hello)
			m.conn, m.handed = conn, len(msg.Files)
			m.mu.Unlock()
			m.configure(conn, first)
		case link.KindReady:
			m.mu.Lock()
			m.ready++
			m.mu.Unlock()
		case link.KindAck:
			m.mu.Lock()
			msg.Decode(&m.ack)
			m.mu.Unlock()
		case link.KindProbe:
			var p link.Probe
			msg.Decode(&p)
			m.mu.Lock()
			is := m.kubelet
			m.mu.Unlock()
			if is != nil {
				conn.Send(link.KindProbed, msg.ID, link.Probed{Kubelet: is(p)})
			}
		case link.KindCSR:
			var csr link.CSR
			msg.Decode(&csr)
			conn.Send(link.KindCertificate, msg.ID, m.sign(csr))
		case link.KindReport:
			var r link.Report
			msg.Decode(&r)
			m.mu.Lock()
			ch := m.reports[msg.ID]
			delete(m.reports, msg.ID)
			m.mu.Unlock()
			if ch != nil {
				ch <- r
			}
		case link.KindFinding:
			var f assay.Finding
			msg.Decode(&f)
			m.mu.Lock()
			m.findings = append(m.findings, f)
			m.mu.Unlock()
		}
		msg.Discard()
	}
}

func (m *workload) configure(conn *link.Conn, first bool) {
	c := link.Configure{
		Workload: m.ID, Identity: m.Identity, Addrs: m.Addrs, AgentSocket: m.sock.Addr().String(),
		OwnMark: ownMark, ReturnMark: returnMark, MeshPrefixes: m.w.mesh, DNS: link.DNS{Domain: "mesh.test"},
		Probes: m.probes, Metrics: m.metrics, Gateways: m.nodes, Transition: m.transition, OlderGrace: m.olderGrace, Host: m.Host, Zone: m.Zone, Nodes: []netip.Addr{netip.MustParseAddr("203.0.113.9")},
	}
	m.w.mu.Lock()
	c.Config = m.w.settings
	m.w.mu.Unlock()
	var fds []int
	if first {
		c.Listeners = roles
		for _, f := range m.files {
			fds = append(fds, int(f.Fd()))
		}
	}
	if err := conn.Send(link.KindConfigure, 0, c, fds...); err != nil {
		return
	}
	m.push(conn)
	conn.Send(link.KindBundle, 0, link.Bundle{Version: 1, Roots: m.w.ca.roots()})
}

// push sends table and services.
func (m *workload) push(conn *link.Conn) {
	w := m.w
	w.mu.Lock()
	var list []assay.Workload
	for _, x := range w.workloads {
		list = append(list, x.Workload)
		if !x.published.IsZero() {
			list[len(list)-1].Identity = x.published
		}
	}
	services, routes := slices.Collect(maps.Values(w.services)), slices.Clone(w.routes)
	version, settings := w.version, w.settings
	w.mu.Unlock()
	fd, err := link.BuildTable(version, list)
	if err != nil {
		w.t.Error(err)
		return
	}
	conn.Send(link.KindTable, 0, link.Table{Version: version}, fd)
	unix.Close(fd)
	conn.Send(link.KindServices, 0, link.Services{Version: version, Full: true, Upsert: services, Routes: routes, Config: &settings})
}

// publish makes what has changed known to all proxies and waits until they use it.
func (w *world) publish() {
	w.t.Helper()
	w.mu.Lock()
	w.version++
	version := w.version
	list := slices.Clone(w.workloads)
	open := map[netip.AddrPort]bool{}
	for _, s := range w.services {
		for _, vip := range s.VIPs {
			for i, p := range s.Ports {
				for _, e := range s.Endpoints {
					if e.Targets[i] != 0 {
						open[netip.AddrPortFrom(vip, p.Port)] = true
					}
				}
			}
		}
	}
	w.mu.Unlock()
	for _, m := range list {
		if m.capture == nil {
			continue
		}
		if err := m.capture.SetOpen(open); err != nil {
			w.t.Fatal(err)
		}
		m.mu.Lock()
		conn := m.conn
		m.mu.Unlock()
		if conn == nil {
			continue
		}
		m.push(conn)
		eventually(w.t, m.ID+" uses the new version", func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.ack.Services == version && m.ack.Table == version
		})
	}
}

// service publishes a service with one port.
func (w *world) service(name string, port uint16, protocol assay.Protocol, target uint16, endpoints ...*workload) netip.AddrPort {
	w.t.Helper()
	s := assay.Service{Namespace: "bank", Name: name, Ports: []assay.Port{{Name: "main", Port: port, Protocol: protocol}}}
	w.mu.Lock()
	n := byte(len(w.services) + 1)
	if old, ok := w.services[s.Key()]; ok {
		s.VIPs = old.VIPs
	} else {
		s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 0, n}), netip.MustParseAddr(fmt.Sprintf("fd5a:5a59:1::%x", n))}
	}
	for _, e := range endpoints {
		id := e.Identity
		if !e.published.IsZero() {
			id = e.published
		}
		s.Endpoints = append(s.Endpoints, assay.Endpoint{Workload: e.ID, Identity: id, Addrs: e.Addrs, Targets: []uint16{target}})
	}
	w.services[s.Key()] = s
	w.mu.Unlock()
	w.publish()
	return netip.AddrPortFrom(s.VIPs[0], port)
}

// serviceAt publishes a service of one port with an endpoint that may be a lie.
func (w *world) serviceAt(name string, port uint16, e assay.Endpoint) netip.AddrPort {
	w.t.Helper()
	s := assay.Service{Namespace: "bank", Name: name, Ports: []assay.Port{{Name: "main", Port: port, Protocol: assay.Opaque}}, Endpoints: []assay.Endpoint{e}}
	w.mu.Lock()
	s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 0, byte(len(w.services) + 1)})}
	w.services[s.Key()] = s
	w.mu.Unlock()
	w.publish()
	return netip.AddrPortFrom(s.VIPs[0], port)
}

func (w *world) setMode(mode assay.Mode) {
	w.mu.Lock()
	w.settings.Mode = mode
	w.mu.Unlock()
	w.publish()
}

func (m *workload) awaitCertificate() {
	m.w.t.Helper()
	eventually(m.w.t, m.ID+" is ready and has a certificate", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.ready > 0 && m.ack.Serial != ""
	})
}

// report asks the proxy for everything that it has counted.
func (m *workload) report() link.Report {
	m.w.t.Helper()
	ch := make(chan link.Report, 1)
	m.mu.Lock()
	m.asked++
	id, conn := m.asked, m.conn
	m.reports[id] = ch
	m.mu.Unlock()
	if conn == nil {
		m.w.t.Fatal("no link")
	}
	if err := conn.Send(link.KindReportNow, id, nil); err != nil {
		m.w.t.Fatal(err)
	}
	select {
	case r := <-ch:
		return r
	case <-time.After(10 * time.Second):
		m.w.t.Fatal("no report within ten seconds")
		panic("unreachable")
	}
}

// sum adds up the series that match.
func sum(r link.Report, match func(assay.SignalKey) bool) (total assay.Signals) {
	for _, s := range r.Signals {
		if match(s.SignalKey) {
			total.Requests += s.Requests
			total.Failures += s.Failures
			total.Opened += s.Opened
			total.BytesIn += s.BytesIn
			total.BytesOut += s.BytesOut
			total.Open += s.Open
			total.InFlight += s.InFlight
		}
	}
	return total
}

func (m *workload) found(kind string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, f := range m.findings {
		if f.Kind == kind {
			n++
		}
	}
	return n
}

// listen listens inside the workload for its application.
func (m *workload) listen(port int) *net.TCPListener { return m.listenOn("tcp", port) }

func (m *workload) listenOn(network string, port int) *net.TCPListener {
	m.w.t.Helper()
	var l net.Listener
	m.do(func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), network, fmt.Sprintf(":%d", port))
		return err
	})
	m.w.t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// serve handles each connection to port in a goroutine of its own.
func (m *workload) serve(port int, handle func(*net.TCPConn)) uint16 {
	m.w.t.Helper()
	l := m.listen(port)
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[*net.TCPConn]bool{}
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				handle(c)
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	m.w.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// dial connects from inside the workload.
func (m *workload) dial(to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	err := m.ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", to.String(), 5*time.Second)
		return err
	})
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	m.w.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), nil
}

func (m *workload) mustDial(to netip.AddrPort) *net.TCPConn {
	m.w.t.Helper()
	c, err := m.dial(to)
	if err != nil {
		m.w.t.Fatal(err)
	}
	return c
}

// exchange sends text and reads as many bytes.
func exchange(t testing.TB, c net.Conn, text string) string {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("read: %v", err)
	}
	return string(b)
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

// expectReset sends text and reads until the connection is reset. The reset is told
// once, by whichever call comes first.
func expectReset(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return
	}
	if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %q, %v; want a reset", b, err)
	}
}

// dialExpectReset is expectReset for a connection that is reset whatever it says:
// connect() itself may be the call that is told.
func (m *workload) dialExpectReset(to netip.AddrPort, text string) {
	m.w.t.Helper()
	c, err := m.dial(to)
	if err == nil {
		expectReset(m.w.t, c, text)
	} else if !errors.Is(err, syscall.ECONNRESET) {
		m.w.t.Errorf("dial: %v, want a reset", err)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

type logWriter struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logWriter) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// authority is a certificate authority.
type authority struct {
	t      *testing.T
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial atomic.Int64
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: domain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.serial.Store(100)
	return a
}

func (a *authority) roots() [][]byte { return [][]byte{a.cert.Raw} }

// sign answers a request as the test wants it answered.
func (m *workload) sign(csr link.CSR) link.Certificate {
	m.mu.Lock()
	m.csrs++
	refuse, life, id, renewAt := m.refuse, m.life, m.identity, m.renewAt
	m.mu.Unlock()
	if refuse != "" {
		return link.Certificate{Refused: refuse, Remedy: "wait", Retry: 50 * time.Millisecond}
	}
	a := m.w.ca
	req, err := x509.ParseCertificateRequest(csr.DER)
	if err != nil || req.CheckSignature() != nil || len(req.URIs) != 1 || req.URIs[0].String() != m.Identity.String() {
		a.t.Errorf("%s: bad certificate request: %v %v", m.ID, req, err)
		return link.Certificate{Refused: "bad request"}
	}
	artifacts, _ := assay.MarshalArtifactExtension(assay.DigestOf([]byte(m.Name)))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial.Add(1)), URIs: []*url.URL{id.URL()}, BasicConstraintsValid: true, Policies: []x509.OID{assay.WorkloadPolicy},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life), ExtraExtensions: []pkix.Extension{artifacts},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, req.PublicKey, a.key)
	if err != nil {
		a.t.Error(err)
		return link.Certificate{Refused: err.Error()}
	}
	c := link.Certificate{Chain: [][]byte{der}, RenewAt: tmpl.NotAfter.Add(-life / 2)}
	if renewAt != nil {
		c.RenewAt = renewAt(tmpl.NotAfter)
	}
	return c
}
