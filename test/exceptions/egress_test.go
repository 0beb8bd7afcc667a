package exceptions

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/test/lab"
)

// certificate is a self-signed one: nobody here checks it.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// partner is a host outside with three servers, which count who comes.
type partner struct {
	*lab.Node
	came atomic.Int64
}

const (
	tlsPort, webPort, greetPort = 8443, 8081, 2525
	answer                      = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
)

func (w *world) partner(name string) *partner {
	p := &partner{Node: w.Node(w.t, name)}
	cert := certificate(w.t)
	page := func(c net.Conn) {
		buf := make([]byte, 4096)
		for n := 0; !strings.Contains(string(buf[:n]), "\r\n\r\n"); {
			k, err := c.Read(buf[n:])
			if err != nil {
				return
			}
			n += k
		}
		io.WriteString(c, answer)
	}
	p.Serve(w.t, tlsPort, func(c *net.TCPConn) {
		p.came.Add(1)
		page(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}))
	})
	p.Serve(w.t, webPort, func(c *net.TCPConn) { p.came.Add(1); page(c) })
	p.Serve(w.t, greetPort, func(c *net.TCPConn) {
		p.came.Add(1)
		io.WriteString(c, "220 ready\r\n")
		io.Copy(io.Discard, c)
	})
	return p
}

// curl runs it in the client's place and returns how it ended.
func (w *world) curl(args ...string) lab.Result {
	w.t.Helper()
	return w.client.Exec(w.t, append([]string{"curl", "-sSk", "-m", "20", "-4"}, args...)...)
}

// greeting connects to a server that speaks first, and returns what it said and when.
func (w *world) greeting(to netip.AddrPort) (string, time.Duration, error) {
	w.t.Helper()
	began := time.Now()
	c, err := w.client.Dial(to)
	if err != nil {
		return "", 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	return string(buf[:n]), time.Since(began), err
}

func (w *world) remote(name, by, reason string, protocol assay.Protocol, port uint16) {
	w.t.Helper()
	w.edge(fmt.Sprintf("%s %s %s %s", name, by, reason, protocol), func(e assay.Edge) bool {
		return e.Client.Identity.Account == "web" && e.Remote == name && e.RemoteBy == by && e.Reason == reason && e.Protocol == protocol && e.Port == port
	})
}

// TestEgressHasNames: connections to outside are known by name, and nothing changes for
// them.
func TestEgressHasNames(t *testing.T) {
	w := newWorld(t, "observe")
	p := w.partner("partner")
	w.Names.Set("api.partner.test", p.IPv4)
	w.Names.Set("mail.partner.test", p.IPv4, p.IPv6)
	for _, url := range []string{fmt.Sprintf("https://api.partner.test:%d/", tlsPort), fmt.Sprintf("http://mail.partner.test:%d/", webPort),
		fmt.Sprintf("http://%s:%d/", p.IPv4, webPort)} {
		if r := w.curl(url); r.Code != 0 || r.Stdout != "ok" {
			t.Errorf("%s: exit code %d, %q %s", url, r.Code, r.Stdout, r.Stderr)
		}
	}
	w.remote("api.partner.test", assay.BySNIDNS, assay.ReasonOutside, assay.TLS, tlsPort)
	w.remote("mail.partner.test", assay.ByHostDNS, assay.ReasonOutside, assay.HTTP1, webPort)
	// A claim that nobody confirms is shown as that.
	if r := w.curl("--resolve", fmt.Sprintf("other.partner.test:%d:%s", tlsPort, p.IPv4), fmt.Sprintf("https://other.partner.test:%d/", tlsPort)); r.Code != 0 {
		t.Errorf("exit code %d: %s", r.Code, r.Stderr)
	}
	w.remote("other.partner.test", assay.BySNI, assay.ReasonOutside, assay.TLS, tlsPort)
	// A server that speaks first is not kept waiting, and has the name that was looked up.
	addrs := w.client.Resolve(t, "mail.partner.test")
	if len(addrs) != 2 {
		t.Fatalf("addresses: %v", addrs)
	}
	text, took, err := w.greeting(netip.AddrPortFrom(addrs[1], greetPort))
	if err != nil || text != "220 ready\r\n" || took > 2*time.Second {
		t.Errorf("greeting %q after %v: %v", text, took, err)
	}
	w.remote("mail.partner.test", assay.ByDNS, assay.ReasonOutside, assay.Opaque, greetPort)
	text = w.MustExec(t, w.Mesh.Assay, "edges", "--exceptions", "--interval", "0")
	if want := fmt.Sprintf("outside: api.partner.test:%d (sni+dns)", tlsPort); !strings.Contains(text, want) {
		t.Errorf("edges lack %q:\n%s", want, text)
	}
}

const egress = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {egress: strict}
---
apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: partners}
spec:
  hosts: [api.partner.test, "*.cdn.test"]
  ports: [8443, 8081, 2525]
---
apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: by-address}
spec: {addresses: [%s], ports: [8081]}
`

// TestStrictEgress: what no Egress allows is refused, and a workload cannot talk its
// way out.
func TestStrictEgress(t *testing.T) {
	w := newWorld(t, "observe")
	p, evil := w.partner("partner"), w.partner("evil")
	w.Names.Set("api.partner.test", p.IPv4)
	w.Names.Set("img.cdn.test", p.IPv4)
	w.Names.Set("unlisted.test", p.IPv4)
	w.Names.Set("evil.test", evil.IPv4)
	w.Write(t, "/tmp/intent/mesh.yaml", fmt.Sprintf(egress, evil.IPv6))
	url := func(host string, port int) string {
		if port == tlsPort {
			return fmt.Sprintf("https://%s:%d/", host, port)
		}
		return fmt.Sprintf("http://%s:%d/", host, port)
	}
	lab.Eventually(t, 20*time.Second, "egress is strict", func() error {
		if r := w.curl(url("evil.test", webPort)); r.Code == 0 {
			return fmt.Errorf("evil.test answers")
		}
		return nil
	})
	before := evil.came.Load()
	works := func(what string, args ...string) {
		t.Helper()
		if r := w.curl(args...); r.Code != 0 || r.Stdout != "ok" {
			t.Errorf("%s: exit code %d, %q %s", what, r.Code, r.Stdout, r.Stderr)
		}
	}
	refused := func(what string, args ...string) {
		t.Helper()
		if r := w.curl(args...); r.Code == 0 || r.Took > 15*time.Second {
			t.Errorf("%s: exit code %d after %v, %q", what, r.Code, r.Took, r.Stdout)
		}
	}
	resolve := func(host string, port int, addr netip.Addr) []string {
		return []string{"--resolve", fmt.Sprintf("%s:%d:%s", host, port, addr), url(host, port)}
	}
	works("an allowed name", url("api.partner.test", tlsPort))
	works("in plain HTTP", url("api.partner.test", webPort))
	works("below a wildcard", url("img.cdn.test", tlsPort))
	works("by address", "-6", "-g", fmt.Sprintf("http://[%s]:%d/", evil.IPv6, webPort))
	if got := evil.came.Load(); got != before+1 {
		t.Errorf("%d connections by address", got-before)
	}
	before = evil.came.Load()
	works("a name that only the proxy resolves", resolve("api.partner.test", tlsPort, p.IPv4)...)

	refused("another name", url("evil.test", tlsPort))
	refused("its address", fmt.Sprintf("http://%s:%d/", evil.IPv4, webPort))
	refused("by address, another port", "-6", "-g", "-k", fmt.Sprintf("https://[%s]:%d/", evil.IPv6, tlsPort))
	refused("an allowed name at another's address, in TLS", resolve("api.partner.test", tlsPort, evil.IPv4)...)
	refused("an allowed name at another's address, in HTTP", resolve("api.partner.test", webPort, evil.IPv4)...)
	refused("a name below a wildcard at another's address", resolve("x.cdn.test", tlsPort, evil.IPv4)...)
	refused("another name at an allowed address", resolve("unlisted.test", tlsPort, p.IPv4)...)
	// The resolver says that evil.test has its address; and the workload asks for it.
	w.client.Resolve(t, "evil.test")
	refused("a looked-up name that claims another", resolve("api.partner.test", tlsPort, evil.IPv4)...)
	if text, _, err := w.greeting(netip.AddrPortFrom(evil.IPv4, greetPort)); err == nil {
		t.Errorf("a server that speaks first said %q", text)
	}
	if got := evil.came.Load(); got != before {
		t.Errorf("%d connections arrived where none may", got-before)
	}
	w.client.Resolve(t, "api.partner.test")
	if text, took, err := w.greeting(netip.AddrPortFrom(p.IPv4, greetPort)); err != nil || text != "220 ready\r\n" || took > 2*time.Second {
		t.Errorf("greeting %q after %v: %v", text, took, err)
	}

	w.remote("api.partner.test", assay.BySNIDNS, assay.ReasonEgress, assay.TLS, tlsPort)
	w.remote("evil.test", assay.BySNIDNS, "egress-unlisted", assay.TLS, tlsPort)
	w.remote("api.partner.test", assay.BySNI, "egress-unproven", assay.TLS, tlsPort)
	_, kinds, code := w.check()
	for _, kind := range []string{"egress-unproven", "egress-unlisted"} {
		if f, ok := kinds[kind]; !ok || code != 2 || f.Remedy == "" || !strings.Contains(f.Subject, ".test:") {
			t.Errorf("check exits with %d: %+v", code, kinds)
		}
	}
	if f, ok := kinds["plaintext"]; ok && strings.Contains(f.Detail, "egress") {
		t.Errorf("what is refused or allowed is found as plaintext: %+v", f)
	}
	// A proxy that has forgotten everything finds out again.
	pid := w.Mesh.Proxy(w.client)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 20*time.Second, "another proxy", func() error {
		if now := w.Mesh.Proxy(w.client); now == 0 || now == pid {
			return fmt.Errorf("proxy %d", now)
		}
		return nil
	})
	works("after the proxy's death", resolve("api.partner.test", tlsPort, p.IPv4)...)
	refused("after the proxy's death", resolve("api.partner.test", tlsPort, evil.IPv4)...)
	if text, _, err := w.greeting(netip.AddrPortFrom(p.IPv4, greetPort)); err != nil || text != "220 ready\r\n" {
		t.Errorf("greeting %q: %v", text, err)
	}
}
