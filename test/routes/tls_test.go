package routes

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// closed is an nginx that ends TLS itself, with a certificate for a name of its own, and
// tells which name it was asked for.
func closed(t *testing.T, w *lab.World, name, host string) *lab.Workload {
	dir := "/tmp/tls-" + name
	w.Dir(t, dir, "")
	w.MustExec(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
		"-keyout", dir+"/key.pem", "-out", dir+"/cert.pem", "-subj", "/CN="+host, "-addext", "subjectAltName=DNS:"+host)
	w.Write(t, dir+"/nginx.conf", fmt.Sprintf(`
user root; worker_processes 1; daemon off; error_log stderr warn; pid %[1]s/nginx.pid;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server {
    listen 8443 ssl; listen [::]:8443 ssl;
    ssl_certificate %[1]s/cert.pem; ssl_certificate_key %[1]s/key.pem;
    location / { return 200 "%[2]s for $ssl_server_name\n"; }
  }
}`, dir, name))
	return w.Workload(t, name, lab.Spec{Ports: []int{8443}, Command: []string{"nginx", "-p", dir, "-c", dir + "/nginx.conf"}})
}

// pieces is a connection that writes a few bytes at a time.
type pieces struct{ net.Conn }

func (p pieces) Write(b []byte) (int, error) {
	for i := 0; i < len(b); i += 100 {
		if _, err := p.Conn.Write(b[i:min(i+100, len(b))]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// TestTLSRoutes: connections of TLS go where the name says that their client asks for,
// and nobody on the way opens them.
func TestTLSRoutes(t *testing.T) {
	lab.Require(t, "ip", "nft", "nginx", "curl", "openssl")
	w := lab.NewWorld(t, lab.Meshed)
	gate := closed(t, w, "gate", "gate.example")
	closed(t, w, "one", "one.example")
	closed(t, w, "two", "x.two.example")
	client := w.Workload(t, "client", lab.Spec{})
	for _, name := range []string{"gate", "one", "two"} {
		w.AwaitService(t, client, name, 8443)
	}
	apply := func(name, hostname, backends string) {
		file := w.Write(t, "/tmp/"+name+".yaml", fmt.Sprintf(`apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: %s, namespace: default}
spec:
  parentRefs: [{group: "", kind: Service, name: gate, port: 8443}, {group: "", kind: Service, name: front}]
  hostnames: [%q]
  rules: [{backendRefs: %s}]
`, name, hostname, backends))
		w.MustExec(t, w.Mesh.Assay, "apply", "-f", file)
	}
	// ask connects to gate, asks for host, and believes the certificate of a server alone.
	ask := func(host, server string, args ...string) lab.Result {
		return client.Exec(t, append([]string{"curl", "-sS", "--max-time", "10", "--connect-to", "::gate:8443",
			"--cacert", "/tmp/tls-" + server + "/cert.pem", "https://" + host + ":8443/"}, args...)...)
	}
	answers := func(what, host, server, want string) {
		t.Helper()
		lab.Eventually(t, 30*time.Second, what, func() error {
			if r := ask(host, server); r.Stdout != want {
				return fmt.Errorf("%q %s", r.Stdout, r.Stderr)
			}
			return nil
		})
	}
	// A service that is nothing but its routes.
	w.MustExec(t, w.Mesh.Assay, "apply", "-f", w.Write(t, "/tmp/front.yaml", `apiVersion: v1
kind: Service
metadata: {name: front, namespace: default}
spec: {ports: [{port: 443, appProtocol: tls}], selector: {app: nobody}}
`))
	answers("without routes the service answers", "gate.example", "gate", "gate for gate.example\n")
	apply("one", "one.example", "[{name: one, port: 8443}]")
	apply("two", "*.two.example", "[{name: two, port: 8443}]")
	answers("a name goes where its route says", "one.example", "one", "one for one.example\n")
	answers("so does one under a name", "x.two.example", "two", "two for x.two.example\n")
	for _, c := range []struct {
		what string
		args []string
	}{
		{"a name that nobody has", []string{"https://gate.example:8443/"}},
		{"no name", []string{"https://192.0.2.1:8443/"}},
		{"no TLS", []string{"http://one.example:8443/"}},
	} {
		r := client.Exec(t, append([]string{"curl", "-sSk", "--max-time", "10", "--connect-to", "::gate:8443"}, c.args...)...)
		if r.Code == 0 || r.Stdout != "" {
			t.Errorf("%s was answered: %q", c.what, r.Stdout)
		}
	}
	// By either family; by the workload's own address, which can only be the service's; and
	// when the first message comes in pieces.
	if r := ask("one.example", "one", "-6"); r.Stdout != "one for one.example\n" {
		t.Errorf("over IPv6: %q %s", r.Stdout, r.Stderr)
	}
	r := client.Exec(t, "curl", "-sS", "--max-time", "10", "--connect-to", "::front:443", "--cacert", "/tmp/tls-two/cert.pem", "https://x.two.example/")
	if r.Stdout != "two for x.two.example\n" {
		t.Errorf("a service without endpoints: %q %s", r.Stdout, r.Stderr)
	}
	to := w.AwaitService(t, client, "gate", 8443)
	c := tls.Client(pieces{client.MustDial(t, to)}, &tls.Config{ServerName: "one.example", InsecureSkipVerify: true}) // the name of its certificate is looked at below
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatalf("a first message in pieces: %v", err)
	}
	if body, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(body), "one for one.example\n") {
		t.Errorf("a first message in pieces: %q, %v", body, err)
	}
	if got := c.ConnectionState().PeerCertificates[0].Subject.CommonName; got != "one.example" {
		t.Errorf("the certificate is %s's", got)
	}
	// What is wrong with a route is said, and breaks no other.
	apply("bad", "bad.example", "[{name: nobody, port: 8443}]")
	lab.Eventually(t, 30*time.Second, "the conditions", func() error {
		out := w.MustExec(t, w.Mesh.Assay, "describe", "tlsroute", "bad")
		if !strings.Contains(out, "BackendNotFound") || !strings.Contains(out, "there is no service default/nobody") {
			return errors.New(out)
		}
		return nil
	})
	if list := w.MustExec(t, w.Mesh.Assay, "get", "tlsroutes"); !strings.Contains(list, "gate:8443") || strings.Count(list, "\n") != 4 {
		t.Errorf("listed:\n%s", list)
	}
	if r := ask("bad.example", "gate"); r.Code == 0 {
		t.Errorf("a backend that does not exist answered %q", r.Stdout)
	}
	answers("others go on", "one.example", "one", "one for one.example\n")
	lab.Eventually(t, 30*time.Second, "what is refused is counted", func() error {
		out := w.MustExec(t, w.Mesh.Assay, "get", "signals", "-o", "json")
		for _, reason := range []string{`"no-rule"`, `"not-tls"`, `"invalid-rule"`} {
			if !strings.Contains(out, reason) {
				return errors.New(reason + " is not counted")
			}
		}
		return nil
	})
	// A client outside the mesh, here a process of the host itself, that dials the workload follows them, too.
	guest := func(host string, times int) lab.Result {
		url := "https://" + host + ":8443/ "
		return w.Exec(t, append([]string{"curl", "-sSk", "--no-keepalive", "-H", "Connection: close", "--max-time", "10", "--connect-to", fmt.Sprintf("::%s:8443", gate.IPv4)},
			strings.Fields(strings.Repeat(url, times))...)...)
	}
	if r := guest("one.example", 1); r.Stdout != "one for one.example\n" {
		t.Errorf("a guest that asks for one.example: %q %s", r.Stdout, r.Stderr)
	}
	if r := guest("gate.example", 1); r.Code == 0 {
		t.Errorf("a guest that asks for a name that nobody has is answered %q", r.Stdout)
	}
	apply("shared", "gate.example", "[{name: gate, port: 8443}, {name: one, port: 8443}]")
	lab.Eventually(t, 30*time.Second, "a guest's connections stay and go on, as weights say", func() error {
		r := guest("gate.example", 40)
		here, there := strings.Count(r.Stdout, "gate for gate.example\n"), strings.Count(r.Stdout, "one for gate.example\n")
		if here+there != 40 || here < 5 || there < 5 {
			return fmt.Errorf("%d stayed and %d went on, of 40: %s", here, there, r.Stderr)
		}
		return nil
	})
	for _, name := range []string{"one", "two", "bad", "shared"} {
		w.MustExec(t, w.Mesh.Assay, "delete", "tlsroute", name)
	}
	answers("without routes the service answers again", "gate.example", "gate", "gate for gate.example\n")
	lab.Eventually(t, 30*time.Second, "without routes a guest gets the application", func() error {
		if r := guest("one.example", 1); r.Stdout != "gate for one.example\n" {
			return fmt.Errorf("%q %s", r.Stdout, r.Stderr)
		}
		return nil
	})
}
