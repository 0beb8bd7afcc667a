// Package routes drives routes of the Gateway API as people use them: curl asks nginx,
// unmodified both, and what arrives shows which rule took the request. The cases follow
// the conformance suite for meshes (MESH-HTTP).
package routes

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// stage is a mesh with a service "shop" of two versions and a few clients.
type stage struct {
	*lab.World
	v1, v2 *lab.Workload // of services shop-v1 and shop-v2
	shop   *lab.Workload // of service shop itself
	client *lab.Workload
	other  *lab.Workload // a client in namespace other
}

// echo is an nginx that tells what it saw, as "NAME METHOD URI HOST x-set x-add x-drop".
func echo(t *testing.T, w *lab.World, name string) *lab.Workload {
	dir := "/tmp/" + name
	w.Dir(t, dir, "")
	w.Write(t, dir+"/nginx.conf", fmt.Sprintf(`
user root; worker_processes 1; daemon off; error_log stderr warn; pid %[1]s/nginx.pid;
events { worker_connections 1024; }
http {
  log_format seen '$request_method $request_uri $http_x_set';
  access_log %[1]s/seen seen;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server {
    listen 8080; listen [::]:8080;
    location / { add_header X-Drop 1; return 200 "%[2]s $request_method $request_uri $http_host set=$http_x_set add=$http_x_add drop=$http_x_drop\n"; }
    location = /from { return 200 "%[2]s $remote_addr\n"; }
    location /upload { client_max_body_size 64m; proxy_pass http://127.0.0.1:8081; }
  }
  server { listen 127.0.0.1:8081; client_max_body_size 64m; location / { return 200 "%[2]s upload\n"; } }
}`, dir, name))
	return w.Workload(t, name, lab.Spec{Ports: []int{8080}, Command: []string{"nginx", "-p", dir, "-c", dir + "/nginx.conf"}})
}

func newStage(t *testing.T) *stage {
	lab.Require(t, "ip", "nft", "nginx", "curl")
	w := lab.NewWorld(t, lab.Meshed)
	s := &stage{World: w, shop: echo(t, w, "shop"), v1: echo(t, w, "shop-v1"), v2: echo(t, w, "shop-v2")}
	s.client = w.Workload(t, "client", lab.Spec{})
	s.other = w.Workload(t, "visitor", lab.Spec{Namespace: "other"})
	for _, name := range []string{"shop", "shop-v1", "shop-v2"} {
		w.AwaitService(t, s.client, name, 8080)
	}
	return s
}

// apply declares routes of namespace default. A rule is YAML, without its indentation.
func (s *stage) apply(t *testing.T, name, namespace, spec string) {
	t.Helper()
	file := s.Write(t, "/tmp/"+name+"-"+namespace+".yaml", fmt.Sprintf(`apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: %s, namespace: %s}
spec:
%s`, name, namespace, spec))
	s.MustExec(t, s.Mesh.Assay, "apply", "-f", file)
}

func (s *stage) curl(t *testing.T, from *lab.Workload, args ...string) string {
	t.Helper()
	r := from.Exec(t, append([]string{"curl", "-sS", "--max-time", "10"}, args...)...)
	if r.Code != 0 {
		return fmt.Sprintf("curl: exit %d: %s", r.Code, strings.TrimSpace(r.Stderr))
	}
	return r.Stdout
}

// eventually asks until the answer is as wanted: a route takes effect within moments.
func (s *stage) eventually(t *testing.T, from *lab.Workload, want string, args ...string) {
	t.Helper()
	got := ""
	err := lab.WaitFor(t.Context(), 15*time.Second, func() error {
		if got = s.curl(t, from, args...); got != want {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		t.Fatalf("curl %s: %q, want %q", strings.Join(args, " "), got, want)
	}
}

func (s *stage) expect(t *testing.T, from *lab.Workload, want string, args ...string) {
	t.Helper()
	if got := s.curl(t, from, args...); got != want {
		t.Errorf("curl %s: %q, want %q", strings.Join(args, " "), got, want)
	}
}

const shop = "http://shop:8080"

func TestRoutes(t *testing.T) {
	s := newStage(t)
	for _, sub := range []struct {
		name string
		run  func(*testing.T, *stage)
	}{
		{"matches and edits", testMatches},
		{"answers", testAnswers},
		{"weights", testWeights},
		{"mirror", testMirror},
		{"session", testSession},
		{"consumer", testConsumer},
		{"not http", testNotHTTP},
		{"guests", testGuests},
		{"conditions", testConditions},
	} {
		t.Run(sub.name, func(t *testing.T) {
			sub.run(t, s)
			// Each leaves the service as it found it.
			s.Exec(t, s.Mesh.Assay, "delete", "httproute", "r")
			s.eventually(t, s.client, "shop GET /clean shop:8080 set= add= drop=\n", shop+"/clean")
		})
	}
}

func testMatches(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules:
  - matches:
    - path: {value: /v2}
    - headers: [{name: version, value: two}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-Set, value: "1"}], add: [{name: X-Add, value: "2"}], remove: [x-drop]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: X-Served-By, value: v2}], remove: [X-Drop]}
    backendRefs: [{name: shop-v2, port: 8080}]
  - matches: [{path: {value: /old}}]
    filters:
    - type: URLRewrite
      urlRewrite: {hostname: new.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}
    backendRefs: [{name: shop-v1, port: 8080}]
  - matches: [{path: {type: Exact, value: /exact}, method: POST, queryParams: [{name: a, value: b}]}]
    backendRefs: [{name: shop-v1, port: 8080}]
  - matches: [{path: {type: RegularExpression, value: "/[a-z]{3}[0-9]"}}]
    backendRefs: [{name: shop-v2, port: 8080}]
  - {}
`)
	s.eventually(t, s.client, "shop-v2 GET /v2 shop:8080 set=1 add=2 drop=\n", shop+"/v2", "-H", "X-Drop: gone", "-H", "x-set: before")
	for _, c := range [][]string{
		{"shop GET / shop:8080 set= add= drop=kept\n", shop + "/", "-H", "X-Drop: kept"},
		{"shop-v2 GET / shop:8080 set=1 add=mine drop=\n", shop + "/", "-H", "Version: two", "-H", "X-Add: mine"},
		{"shop-v1 GET /new/a%20b?q=/old new.example set= add= drop=\n", shop + "/old/a%20b?q=/old"},
		{"shop-v1 POST /exact?a=b shop:8080 set= add= drop=\n", shop + "/exact?a=b", "-d", "x"},
		{"shop GET /exact?a=b shop:8080 set= add= drop=\n", shop + "/exact?a=b"},
		{"shop-v2 GET /abc1 shop:8080 set= add= drop=\n", shop + "/abc1"},
		{"shop GET /abcd1 shop:8080 set= add= drop=\n", shop + "/abcd1"},
	} {
		s.expect(t, s.client, c[0], c[1:]...)
	}
	head := s.curl(t, s.client, "-I", shop+"/v2/x")
	if !strings.Contains(head, "X-Served-By: v2\r\n") || strings.Contains(head, "X-Drop") || !strings.HasPrefix(head, "HTTP/1.1 200") {
		t.Errorf("the response's head: %q", head)
	}
	// By either family, and by the address of the workload, which can only be the service's.
	s.expect(t, s.client, "shop-v2 GET /v2 shop:8080 set=1 add=2 drop=\n", "-6", shop+"/v2")
	address := fmt.Sprintf("%s:8080", s.shop.IPv4)
	s.expect(t, s.client, "shop-v2 GET /v2 "+address+" set=1 add=2 drop=\n", "http://"+address+"/v2")
	// Many requests on one connection go different ways.
	s.expect(t, s.client, "shop-v2 GET /v2 shop:8080 set=1 add=2 drop=\n1shop GET /a shop:8080 set= add= drop=\n0", shop+"/v2", shop+"/a", "-w", "%{num_connects}")
}

func testAnswers(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop}]
  rules:
  - matches: [{path: {value: /moved}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {scheme: https, hostname: new.example, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /there}}
  - matches: [{path: {value: /missing}}]
    backendRefs: [{name: nobody, port: 8080}]
  - matches: [{path: {value: /half}}]
    backendRefs: [{name: nobody, port: 8080}, {name: shop-v1, port: 8080}]
  - matches: [{path: {value: /cors}, method: PUT}]
    filters:
    - type: CORS
      cors: {allowOrigins: ["https://*.bank.example"], allowMethods: [PUT], maxAge: 60}
  - matches: [{path: {value: /limited}}]
    filters: [{type: ExtensionRef, extensionRef: {group: example.net, kind: RateLimit, name: x}}]
`)
	code := []string{"-o", "/dev/null", "-w", "%{http_code} %{redirect_url}"}
	s.eventually(t, s.client, "301 https://new.example/there/a?b=c", append(code, shop+"/moved/a?b=c")...)
	s.expect(t, s.client, "500 ", append(code, shop+"/missing")...)
	s.expect(t, s.client, "404 ", append(code, shop+"/else")...)
	s.expect(t, s.client, "500 ", append(code, shop+"/limited")...)
	seen := map[string]int{}
	for range 40 {
		seen[s.curl(t, s.client, append(code, shop+"/half")...)]++
	}
	if seen["500 "] < 5 || seen["200 "] < 5 || seen["500 "]+seen["200 "] != 40 {
		t.Errorf("half of the backends is missing, and the answers were %v", seen)
	}
	preflight := s.curl(t, s.client, "-i", "-X", "OPTIONS", "-H", "Origin: https://www.bank.example", "-H", "Access-Control-Request-Method: PUT", shop+"/cors")
	for _, want := range []string{"HTTP/1.1 204", "Access-Control-Allow-Origin: https://www.bank.example\r\n", "Access-Control-Allow-Methods: PUT\r\n", "Access-Control-Max-Age: 60\r\n"} {
		if !strings.Contains(preflight, want) {
			t.Errorf("the preflight's answer %q lacks %q", preflight, want)
		}
	}
	actual := s.curl(t, s.client, "-i", "-X", "PUT", "-H", "Origin: https://www.bank.example", shop+"/cors")
	if !strings.HasPrefix(actual, "HTTP/1.1 200") || !strings.Contains(actual, "Access-Control-Allow-Origin: https://www.bank.example\r\n") {
		t.Errorf("%q", actual)
	}
	if why := s.curl(t, s.client, shop+"/missing"); !strings.Contains(why, "BackendNotFound") || !strings.Contains(why, "HTTPRoute/default/r") {
		t.Errorf("the refusal does not say why: %q", why)
	}
}

func testWeights(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules:
  - backendRefs:
    - {name: shop-v1, port: 8080, weight: 7}
    - name: shop-v2
      port: 8080
      weight: 3
      filters:
      - type: RequestHeaderModifier
        requestHeaderModifier: {set: [{name: X-Set, value: canary}]}
`)
	const want = "shop-v2 GET /w shop:8080 set=canary add= drop=\n"
	s.eventually(t, s.client, want, shop+"/w")
	const n = 400
	var urls []string
	for range n {
		urls = append(urls, shop+"/w")
	}
	got := s.curl(t, s.client, urls...)
	v1, v2 := strings.Count(got, "shop-v1 GET /w shop:8080 set= add= drop=\n"), strings.Count(got, want)
	if v1+v2 != n || v2 < 75 || v2 > 165 { // 120, deviation 9
		t.Errorf("%d and %d of %d", v1, v2, n)
	}
	// The change of a weight reaches connections that are open.
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules: [{backendRefs: [{name: shop-v1, port: 8080, weight: 0}, {name: shop-v2, port: 8080, weight: 1}]}]
`)
	s.eventually(t, s.client, strings.Repeat("shop-v2 GET /w shop:8080 set= add= drop=\n", 20), urls[:20]...)
}

func testMirror(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules:
  - filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-Set, value: twice}]}
    - type: RequestMirror
      requestMirror: {backendRef: {name: shop-v2, port: 8080}}
    backendRefs: [{name: shop-v1, port: 8080}]
`)
	s.eventually(t, s.client, "shop-v1 GET /m shop:8080 set=twice add= drop=\n", shop+"/m")
	s.expect(t, s.client, "shop-v1 upload\n", "-T", "-", shop+"/upload", "-H", "Expect:")
	for range 9 {
		s.expect(t, s.client, "shop-v1 GET /m shop:8080 set=twice add= drop=\n", shop+"/m")
	}
	seen := ""
	err := lab.WaitFor(t.Context(), 10*time.Second, func() error {
		seen = s.MustExec(t, "cat", "/tmp/shop-v2/seen")
		if n := strings.Count(seen, "GET /m twice\n"); n < 10 {
			return fmt.Errorf("%d copies of 10 requests", n)
		}
		if !strings.Contains(seen, "PUT /upload twice\n") {
			return errors.New("no copy of the upload")
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v: %q", err, seen)
	}
}

func testSession(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules:
  - sessionPersistence: {sessionName: sticky}
    backendRefs: [{name: shop-v1, port: 8080}, {name: shop-v2, port: 8080}]
`)
	s.eventually(t, s.client, "", "-o", "/dev/null", "-c", "/tmp/none", shop+"/s")
	err := lab.WaitFor(t.Context(), 10*time.Second, func() error {
		if !strings.Contains(s.curl(t, s.client, "-i", shop+"/s"), "Set-Cookie: sticky=") {
			return errors.New("no cookie")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 6 {
		first := s.curl(t, s.client, "-i", shop+"/s")
		_, cookie, _ := strings.Cut(first, "Set-Cookie: ")
		cookie, _, _ = strings.Cut(cookie, ";")
		name := "shop-v1"
		if strings.Contains(first, "shop-v2 ") {
			name = "shop-v2"
		}
		line := name + " GET /s shop:8080 set= add= drop=\n"
		s.expect(t, s.client, strings.Repeat(line, 10), append([]string{"-H", "Cookie: " + cookie}, strings.Fields(strings.Repeat(shop+"/s ", 10))...)...)
	}
}

// testConsumer: a route in a client's namespace is for that namespace's clients alone.
func testConsumer(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules: [{backendRefs: [{name: shop-v1, port: 8080}]}]
`)
	s.apply(t, "mine", "other", `
  parentRefs: [{group: "", kind: Service, name: shop, namespace: default, port: 8080}]
  rules:
  - filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-Set, value: consumer}]}
    backendRefs: [{name: shop-v2, namespace: default, port: 8080}]
`)
	defer s.Exec(t, s.Mesh.Assay, "delete", "httproute", "other/mine")
	s.eventually(t, s.client, "shop-v1 GET /c shop:8080 set= add= drop=\n", shop+"/c")
	s.eventually(t, s.other, "500", "-o", "/dev/null", "-w", "%{http_code}", "http://shop.default:8080/c") // not permitted
	grant := s.Write(t, "/tmp/grant.yaml", `apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: other, namespace: default}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: other}]
  to: [{group: "", kind: Service, name: shop-v2}]
`)
	s.MustExec(t, s.Mesh.Assay, "apply", "-f", grant)
	s.eventually(t, s.other, "shop-v2 GET /c shop.default:8080 set=consumer add= drop=\n", "http://shop.default:8080/c")
	s.expect(t, s.client, "shop-v1 GET /c shop:8080 set= add= drop=\n", shop+"/c")
}

// testNotHTTP: what has no requests does not pass by the rules for them.
func testNotHTTP(t *testing.T, s *stage) {
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules: [{backendRefs: [{name: shop-v1, port: 8080}]}]
`)
	s.eventually(t, s.client, "shop-v1 GET / shop:8080 set= add= drop=\n", shop+"/")
	r := s.client.ExecInput(t, "\x16not a hello, and no request\r\n", "curl", "-sS", "--max-time", "5", "telnet://shop:8080")
	if r.Code == 0 || r.Stdout != "" {
		t.Errorf("what is not HTTP was answered: %+v", r)
	}
	err := lab.WaitFor(t.Context(), 20*time.Second, func() error {
		if out := s.MustExec(t, s.Mesh.Assay, "get", "signals", "-o", "json"); !strings.Contains(out, `"not-http"`) {
			return errors.New("it is not counted")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// testGuests: a client outside the mesh, here a process of the host itself, does not pass the weights by either. What stays
// with the workload sees its real client.
func testGuests(t *testing.T, s *stage) {
	url := fmt.Sprintf("http://%s:8080", s.shop.IPv4)
	ask := func(args ...string) string {
		r := s.Exec(t, append([]string{"curl", "-sS", "--max-time", "10"}, args...)...)
		return r.Stdout + r.Stderr
	}
	before := ask(url + "/from")
	if !strings.HasPrefix(before, "shop ") || strings.Contains(before, s.shop.IPv4.String()) {
		t.Fatalf("without routes a guest is answered %q", before)
	}
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop, port: 8080}]
  rules:
  - matches: [{path: {value: /moved}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: new.example}}]
  - filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: X-Routed, value: "1"}]}
    backendRefs: [{name: shop, port: 8080}, {name: shop-v2, port: 8080}]
`)
	err := lab.WaitFor(t.Context(), 15*time.Second, func() error {
		if got := ask("-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", url+"/moved"); got != "302 http://new.example:8080/moved" {
			return fmt.Errorf("a redirect answered %q", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	args := strings.Fields(strings.Repeat(url+"/from ", 60))
	got := ask(append(args, "-D", "/dev/stderr")...)
	here := strings.Count(got, before)
	there := strings.Count(got, fmt.Sprintf("shop-v2 %s\n", s.shop.IPv4))
	if here+there != 60 || here < 10 || there < 10 || strings.Count(got, "X-Routed: 1\r\n") != 60 {
		t.Errorf("%d stayed and %d went on, of 60: %q", here, there, got[:min(len(got), 600)])
	}
}

func testConditions(t *testing.T, s *stage) {
	s.apply(t, "bad", "default", `
  parentRefs: [{group: "", kind: Service, name: shop}, {group: "", kind: Service, name: nobody}]
  rules:
  - matches: [{path: {value: /good}}]
    backendRefs: [{name: shop-v2, port: 8080}]
  - matches: [{path: {type: Glob, value: "*"}}]
`)
	defer s.Exec(t, s.Mesh.Assay, "delete", "httproute", "bad")
	s.apply(t, "r", "default", `
  parentRefs: [{group: "", kind: Service, name: shop}]
  rules: [{backendRefs: [{name: shop-v1, port: 8080}]}]
`)
	s.eventually(t, s.client, "shop-v1 GET / shop:8080 set= add= drop=\n", shop+"/")
	s.expect(t, s.client, "shop-v2 GET /good shop:8080 set= add= drop=\n", shop+"/good")
	out := s.MustExec(t, s.Mesh.Assay, "describe", "httproute", "bad")
	for _, want := range []string{"PartiallyInvalid", "Dropped Rule 1", "NoMatchingParent", "there is no service default/nobody"} {
		if !strings.Contains(out, want) {
			t.Errorf("%s lacks %q", out, want)
		}
	}
}
