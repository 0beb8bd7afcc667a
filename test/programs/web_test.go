package programs

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
	"golang.org/x/net/websocket"
)

func TestWeb(t *testing.T) {
	run(t, []scenario{
		{"nginx", []string{"nginx", "curl"}, testNginx},
		{"own TLS", []string{"nginx", "curl", "openssl"}, testOwnTLS},
		{"download", []string{"nginx", "curl", "openssl"}, testDownload},
		{"websocket", nil, testWebSocket},
	})
}

// nginx writes a configuration and returns the command that runs it.
func nginx(t *testing.T, w *lab.World, dir, servers string) []string {
	w.Dir(t, dir+"/www", "")
	w.Write(t, dir+"/nginx.conf", fmt.Sprintf(`
user root; worker_processes 1; daemon off; error_log stderr warn; pid %[1]s/nginx.pid;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  %[2]s
}`, dir, servers))
	return []string{"nginx", "-p", dir, "-c", dir + "/nginx.conf"}
}

func testNginx(t *testing.T, w *lab.World) {
	server := w.Workload(t, "web", lab.Spec{Ports: []int{8080}, Command: nginx(t, w, "/tmp/web", `
  server {
    listen 8080; listen [::]:8080; root /tmp/web/www; dav_methods PUT; client_max_body_size 64m; gzip on; gzip_min_length 1; gzip_types text/plain;
    location = /who { return 200 "$remote_addr $host $http_x_case $request_method\n"; }
    location = /moved { return 302 /who; }
    location = /gone { return 410; }
  }`)})
	w.Write(t, "/tmp/web/www/text.txt", strings.Repeat("a line of text\n", 1000))
	client := w.Workload(t, "browser", lab.Spec{})
	w.AwaitService(t, client, "web", 8080)
	curl := func(args ...string) string {
		t.Helper()
		return client.MustExec(t, append([]string{"curl", "-sS", "--max-time", "20"}, args...)...)
	}
	if got, want := curl("-4", "http://web:8080/who", "-H", "X-Case: Kept"), client.IPv4.String()+" web Kept GET\n"; got != want {
		t.Errorf("over IPv4 the server saw %q, want %q", got, want)
	}
	if got, want := curl("-6", "http://web:8080/who"), client.IPv6.String()+" web  GET\n"; got != want {
		t.Errorf("over IPv6 the server saw %q, want %q", got, want)
	}
	// By the server's own address, without its name.
	if got, want := curl(fmt.Sprintf("http://%s:8080/who", server.IPv4)), client.IPv4.String()+" "+server.IPv4.String()+"  GET\n"; got != want {
		t.Errorf("by address the server saw %q, want %q", got, want)
	}
	if got := curl("-L", "-o", "/dev/null", "-w", "%{http_code} %{num_redirects} %{num_connects}", "http://web:8080/moved"); got != "200 1 1" {
		t.Errorf("redirect: code, redirects, connections = %s, want 200 1 1: the connection is kept", got)
	}
	for path, code := range map[string]string{"/gone": "410", "/none": "404", "/text.txt": "200"} {
		for _, method := range []string{"-XGET", "-I"} {
			if got := curl(method, "-o", "/dev/null", "-w", "%{http_code}", "http://web:8080"+path); got != code {
				t.Errorf("%s %s: code %s, want %s", method, path, got, code)
			}
		}
	}
	if got := curl("--compressed", "http://web:8080/text.txt"); len(got) != 15000 {
		t.Errorf("compressed (chunked) answer has %d bytes, want 15000", len(got))
	}
	if got := curl("-r", "3-6", "http://web:8080/text.txt"); got != "ine " {
		t.Errorf("range answered %q", got)
	}
	// curl asks for 100-continue before a large body, and sends chunks from a pipe.
	body := strings.Repeat("0123456789abcdef", 1<<16)
	for i, args := range [][]string{{"-T", "-"}, {"-T", "-", "-H", "Expect: 100-continue"}, {"--http1.0", "-T", "/tmp/web/body"}} {
		w.Write(t, "/tmp/web/body", body)
		url := fmt.Sprintf("http://web:8080/put%d", i)
		r := client.ExecInput(t, body, append([]string{"curl", "-sS", "--max-time", "20", "-o", "/dev/null", "-w", "%{http_code}", url}, args...)...)
		if r.Stdout != "201" {
			t.Errorf("upload %v: code %s %s, want 201", args, r.Stdout, r.Stderr)
		}
		if got, err := os.ReadFile(w.Path(fmt.Sprintf("/tmp/web/www/put%d", i))); err != nil || string(got) != body {
			t.Errorf("upload %v: %d bytes arrived of %d, %v", args, len(got), len(body), err)
		}
	}
	if got := curl("--http1.0", "-o", "/dev/null", "-w", "%{http_version} %{http_code}", "http://web:8080/who"); got != "1.1 200" {
		t.Errorf("HTTP/1.0 request: answered %q, want nginx's own 1.1 200", got)
	}
	// Many requests at the same time and after each other.
	urls := strings.Fields(strings.Repeat("http://web:8080/who ", 200))
	if got := curl(append([]string{"--parallel", "--parallel-max", "20"}, urls...)...); strings.Count(got, client.IPv4.String())+strings.Count(got, client.IPv6.String()) != 200 {
		t.Errorf("200 parallel requests had %d answers", strings.Count(got, "\n"))
	}
}

func testOwnTLS(t *testing.T, w *lab.World) {
	dir := w.Dir(t, "/tmp/tls", "")
	w.MustExec(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
		"-subj", "/CN=secure", "-addext", "subjectAltName=DNS:secure", "-keyout", dir+"/key.pem", "-out", dir+"/crt.pem")
	w.Workload(t, "secure", lab.Spec{Ports: []int{8443}, Command: nginx(t, w, dir, `
  server {
    listen 8443 ssl http2; listen [::]:8443 ssl http2; ssl_certificate /tmp/tls/crt.pem; ssl_certificate_key /tmp/tls/key.pem;
    location / { return 200 "$remote_addr $ssl_server_name $server_protocol\n"; }
  }`)})
	client := w.Workload(t, "tls-client", lab.Spec{})
	w.AwaitService(t, client, "secure", 8443)
	for flag, version := range map[string]string{"--http1.1": "HTTP/1.1", "--http2": "HTTP/2.0"} {
		got := client.MustExec(t, "curl", "-sS", "-4", "--max-time", "10", flag, "--cacert", dir+"/crt.pem", "https://secure:8443/")
		if want := client.IPv4.String() + " secure " + version + "\n"; got != want {
			t.Errorf("%s: the server saw %q, want %q", flag, got, want)
		}
	}
	// Its certificate is the application's, all the way.
	r := client.Exec(t, "curl", "-sS", "--max-time", "10", "https://secure:8443/")
	if r.Code != 60 {
		t.Errorf("without the application's CA curl ended with %d, want 60 (%s)", r.Code, r.Stderr)
	}
}

// testDownload carries 1 GiB and watches the memory of the proxies meanwhile.
func testDownload(t *testing.T, w *lab.World) {
	const size = 1 << 30
	command := nginx(t, w, "/tmp/files", `server { listen 8080; listen [::]:8080; root /tmp/files/www; sendfile on; }`)
	w.MustExec(t, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero | openssl enc -aes-128-ctr -K 000102030405060708090a0b0c0d0e0f -iv 00000000000000000000000000000001 > /tmp/files/www/big", size))
	t.Cleanup(func() { os.Remove(w.Path("/tmp/files/www/big")) })
	want := strings.Fields(w.MustExec(t, "sha256sum", "/tmp/files/www/big"))[0]
	server := w.Workload(t, "files", lab.Spec{Ports: []int{8080}, Command: command})
	client := w.Workload(t, "downloader", lab.Spec{})
	w.AwaitService(t, client, "files", 8080)
	p := client.Start(t, "sh", "-c", "curl -sS --max-time 50 http://files:8080/big | sha256sum")
	most := map[string]int64{}
	lab.Eventually(t, time.Minute, "the download ends", func() error {
		if w.Mode == lab.Meshed {
			for _, x := range []*lab.Workload{server, client} {
				most[x.Name] = max(most[x.Name], residentBytes(w.Mesh.Proxy(x)))
			}
		}
		if !p.Ended() {
			return fmt.Errorf("still running")
		}
		return nil
	})
	if got := strings.Fields(p.Output()); p.Code() != 0 || len(got) == 0 || got[0] != want {
		t.Errorf("checksum %v, want %s (exit code %d)", got, want, p.Code())
	}
	for name, bytes := range most {
		t.Logf("proxy of %s: at most %d MB resident", name, bytes>>20)
		if bytes > 48<<20 {
			t.Errorf("proxy of %s grew to %d MB while 1 GiB passed", name, bytes>>20)
		}
	}
}

func residentBytes(pid int) int64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	var kb int64
	fmt.Sscan(rest, &kb)
	return kb << 10
}

func testWebSocket(t *testing.T, w *lab.World) {
	server := w.Workload(t, "sockets", lab.Spec{Ports: []int{9000}})
	client := w.Workload(t, "socket-client", lab.Spec{})
	echo := websocket.Server{Handler: func(ws *websocket.Conn) {
		ws.PayloadType = websocket.BinaryFrame
		fmt.Fprint(ws, "hello")
		io.Copy(ws, ws)
	}}
	serveHTTP(t, server, 9000, echo)
	to := w.AwaitService(t, client, "sockets", 9000)
	config, err := websocket.NewConfig("ws://sockets:9000/chat", "http://sockets/")
	if err != nil {
		t.Fatal(err)
	}
	ws, err := websocket.NewClient(config, deadline(client.MustDial(t, to)))
	if err != nil {
		t.Fatalf("handshake: %v", err)
	}
	defer ws.Close()
	ws.PayloadType = websocket.BinaryFrame
	greeting := make([]byte, 5)
	if _, err := io.ReadFull(ws, greeting); err != nil || string(greeting) != "hello" {
		t.Fatalf("the server speaks first after the upgrade: %q, %v", greeting, err)
	}
	for _, size := range []int{1, 125, 126, 65535, 65536, 1 << 20} {
		message := bytes.Repeat([]byte{byte(size)}, size)
		go ws.Write(message)
		got := make([]byte, size)
		if _, err := io.ReadFull(ws, got); err != nil || sha256.Sum256(got) != sha256.Sum256(message) {
			t.Fatalf("message of %d bytes came back wrong: %v", size, err)
		}
	}
}

func deadline(c net.Conn) net.Conn {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}
