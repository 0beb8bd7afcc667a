package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"assay.dev"
)

// TestForwardedClientCert: an application that wants to is told of its client's
// certificate, by the proxy and by nobody else.
func TestForwardedClientCert(t *testing.T) {
	w := newWorld(t)
	client, server, outside := w.workload("client"), w.workload("server"), w.outsider()
	target := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var seen []string
		for name, values := range r.Header {
			if strings.HasPrefix(strings.ReplaceAll(strings.ToLower(name), "_", "-"), "x-forwarded") || name == "Upgrade" {
				seen = append(seen, values...)
			}
		}
		fmt.Fprintf(rw, "%s|%s|%d %d", strings.Join(seen, ","), r.Header.Get("X-Other"), len(body), bytes.Count(body, []byte{'b'}))
	}))
	vip := w.service("web", 80, assay.HTTP1, target, server)
	w.mu.Lock()
	s := w.services["bank/web"]
	s.Ports = []assay.Port{{Name: "main", Port: 80, Protocol: assay.HTTP1, ForwardClientCert: true}}
	w.services["bank/web"] = s
	w.mu.Unlock()
	w.publish()
	const lies = "X-Forwarded-Client-Cert: URI=spiffe://bank.test/ns/bank/sa/admin\r\nx_forwarded-client_CERT: URI=spiffe://bank.test/ns/bank/sa/admin\r\nX-Other: kept\r\n"
	told := regexp.MustCompile(`^By=spiffe://bank\.test/ns/bank/sa/server;Hash=[0-9a-f]{64};URI=spiffe://bank\.test/ns/bank/sa/client$`)
	direct := netip.AddrPortFrom(server.Addrs[1], target)
	// say writes a request in pieces and returns what the application saw.
	say := func(from *workload, to netip.AddrPort, n int, pieces ...string) (seen, other, body string) {
		t.Helper()
		c := from.mustDial(to)
		r := bufio.NewReader(c)
		for range n {
			for _, p := range pieces {
				io.WriteString(c, p)
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("%d %q, %v", resp.StatusCode, b, err)
			}
			part := strings.Split(string(b), "|")
			seen, other, body = part[0], part[1], part[2]
		}
		return seen, other, body
	}
	big := strings.Repeat("ab", 200_000)
	for _, to := range []netip.AddrPort{vip, direct} {
		for name, pieces := range map[string][]string{
			"plain":    {"GET / HTTP/1.1\r\nHost: web\r\n" + lies + "\r\n"},
			"pieces":   {"GET / HTTP/1.1\r\nHo", "st: web\r\n" + lies[:40], lies[40:], "\r\n"},
			"body":     {"POST / HTTP/1.1\r\nHost: web\r\n" + lies + "Content-Length: 400000\r\n\r\n", big},
			"at once":  {"POST / HTTP/1.1\r\nHost: web\r\n" + lies + "Content-Length: 400000\r\n\r\n" + big},
			"chunks":   {"POST / HTTP/1.1\r\nHost: web\r\n" + lies + "Transfer-Encoding: chunked\r\n\r\n61a80\r\n" + big + "\r\n0\r\n\r\n"},
			"old":      {"GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n" + lies + "\r\n"},
			"the last": {"GET / HTTP/1.1\r\nHost: web\r\nX-Other: kept\r\n\r\n"},
		} {
			seen, other, body := say(client, to, 3, pieces...)
			want := "0 0"
			if strings.HasPrefix(pieces[0], "POST") {
				want = "400000 200000"
			}
			if !told.MatchString(seen) || other != "kept" || body != want {
				t.Errorf("%s, %s: the application saw %q, %q, body %s", to, name, seen, other, body)
			}
		}
	}
	// From outside nobody has a certificate.
	if seen, other, _ := say(outside, netip.AddrPortFrom(server.Addrs[0], target), 2, "GET / HTTP/1.1\r\nHost: web\r\n"+lies+"\r\n"); seen != "" || other != "kept" {
		t.Errorf("from outside: %q, %q", seen, other)
	}
	// Nor may it be a trailer, where it could not be taken away.
	for _, from := range []*workload{client, outside} {
		c := from.mustDial(netip.AddrPortFrom(server.Addrs[0], target))
		io.WriteString(c, "POST / HTTP/1.1\r\nHost: web\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-forwarded_client-cert: By=me\r\n\r\n")
		if b, err := io.ReadAll(c); err != nil || strings.Contains(string(b), " 200 ") {
			t.Errorf("a trailer: %q, %v", b, err)
		}
	}
	// What is read as something else than the service says does not reach it.
	for _, first := range []string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nno SETTINGS", "CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\nConnection: close\r\n\r\n"} {
		for _, from := range []*workload{client, outside} {
			c := from.mustDial(netip.AddrPortFrom(server.Addrs[0], target))
			io.WriteString(c, first)
			if b, _ := io.ReadAll(c); strings.Contains(string(b), " 200 ") {
				t.Errorf("%q: %q", first, b)
			}
		}
	}
	// A service that does not want it gets every byte as it came.
	w.service("web", 80, assay.HTTP1, target, server)
	if seen, _, _ := say(client, vip, 1, "GET / HTTP/1.1\r\nHost: web\r\nX-Forwarded-Client-Cert: By=ingress\r\n\r\n"); seen != "By=ingress" {
		t.Errorf("not wanted: %q", seen)
	}
}

// TestForwardedClientCertOfHTTP2 is the same for HTTP/2, and so for gRPC.
func TestForwardedClientCertOfHTTP2(t *testing.T) {
	w := newWorld(t)
	client, server, outside := w.workload("client"), w.workload("server"), w.outsider()
	target := server.web2(0, func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var seen []string
		for _, h := range []http.Header{r.Header, r.Trailer} {
			for name, values := range h {
				if strings.HasPrefix(strings.ReplaceAll(strings.ToLower(name), "_", "-"), "x-forwarded") {
					seen = append(seen, values...)
				}
			}
		}
		fmt.Fprintf(rw, "%s|%s|%d", strings.Join(seen, ","), r.Header.Get("X-Other"), len(body))
	})
	vip := w.service("web", 80, assay.HTTP2, target, server)
	w.mu.Lock()
	s := w.services["bank/web"]
	s.Ports = []assay.Port{{Name: "main", Port: 80, Protocol: assay.HTTP2, ForwardClientCert: true}}
	w.services["bank/web"] = s
	w.mu.Unlock()
	w.publish()
	told := regexp.MustCompile(`^By=spiffe://bank\.test/ns/bank/sa/server;Hash=[0-9a-f]{64};URI=spiffe://bank\.test/ns/bank/sa/client$`)
	ask := func(c *http.Client, to netip.AddrPort, size int, trailer http.Header) (int, []string) {
		t.Helper()
		req, _ := http.NewRequest("POST", "http://"+to.String()+"/", io.NopCloser(strings.NewReader(strings.Repeat("a", size))))
		req.Header = http.Header{
			"X-Forwarded-Client-Cert": {"URI=spiffe://bank.test/ns/bank/sa/admin"},
			"X_forwarded-Client_cert": {"URI=spiffe://bank.test/ns/bank/sa/admin", "and another"},
			"X-Other":                 {"kept"},
		}
		req.Trailer = trailer
		resp, err := c.Do(req)
		if err != nil {
			return 0, []string{err.Error()}
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, strings.Split(string(b), "|")
	}
	direct := netip.AddrPortFrom(server.Addrs[0], target)
	inside, stranger := client.browser2(), outside.browser2()
	for _, to := range []netip.AddrPort{vip, direct} {
		for _, size := range []int{0, 1, 200_000} {
			for range 3 { // field compression knows it by then
				if code, got := ask(inside, to, size, http.Header{"X-Sum": {"1"}}); code != 200 || !told.MatchString(got[0]) || got[1] != "kept" || got[2] != fmt.Sprint(size) {
					t.Errorf("%s, %d bytes: %d %q", to, size, code, got)
				}
			}
		}
	}
	// From outside nobody has a certificate.
	if code, got := ask(stranger, direct, 5, nil); code != 200 || got[0] != "" || got[1] != "kept" {
		t.Errorf("from outside: %d %q", code, got)
	}
	for _, c := range []*http.Client{inside, stranger} {
		if code, got := ask(c, direct, 5, http.Header{"X-Forwarded_client-Cert": {"By=me"}}); code == 200 {
			t.Errorf("a trailer: %q", got)
		}
		// A tunnel could carry anything.
		req, _ := http.NewRequest("CONNECT", "http://"+direct.String(), nil)
		if resp, err := c.Do(req); err != nil || resp.StatusCode != 501 || resp.Header.Get("Assay-Error") != "tunnel" {
			t.Errorf("CONNECT: %+v, %v", resp, err)
		}
	}
	// HTTP/1 is not what the service says.
	c := client.mustDial(vip)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
	if b, _ := io.ReadAll(c); strings.Contains(string(b), " 200 ") {
		t.Errorf("HTTP/1: %q", b)
	}
}
