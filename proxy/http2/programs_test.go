package http2

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// nginx serves files below a folder with HTTP/2, without TLS. It inherits its listener.
func nginx(t *testing.T, folder string) string {
	bin, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("no nginx")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // f is a copy
	conf := filepath.Join(folder, "nginx.conf")
	text := fmt.Sprintf(`daemon off; user root; worker_processes 1; pid %[1]s/pid; error_log stderr crit;
events {}
http {
	access_log off; client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
	server { listen %[2]s http2; root %[1]s/www; client_max_body_size 0; }
}
`, folder, l.Addr())
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-p", folder, "-e", "stderr", "-c", conf)
	cmd.Env = append(os.Environ(), "NGINX=3;")
	cmd.ExtraFiles = []*os.File{f}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // it ends its worker
		cmd.Wait()
		if t.Failed() {
			t.Logf("nginx: %s", &said)
		}
	})
	return l.Addr().String()
}

// TestPrograms has curl, nghttp and h2load speak with nginx, none of which was made by
// those who made the libraries of the other tests.
func TestPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("runs other programs")
	}
	folder := t.TempDir()
	os.Mkdir(filepath.Join(folder, "www"), 0o755)
	big := strings.Repeat("0123456789abcdef", 3<<20/16)
	for name, content := range map[string]string{"small": "hello\n", "big": big} {
		if err := os.WriteFile(filepath.Join(folder, "www", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, nginx(t, folder), quiet)
	url := "http://" + w.addr
	run := func(t *testing.T, name string, args ...string) string {
		t.Helper()
		if _, err := exec.LookPath(name); err != nil {
			t.Skip("no " + name)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	t.Run("curl", func(t *testing.T) {
		curl := func(args ...string) string {
			return run(t, "curl", append([]string{"-sS", "--http2-prior-knowledge", "-w", " %{http_version} %{http_code}"}, args...)...)
		}
		if got := curl(url + "/big"); got != big+" 2 200" {
			t.Errorf("%d bytes, ending with %q", len(got), got[max(len(got)-20, 0):])
		}
		if got := curl("-I", url+"/big"); !strings.Contains(got, "content-length: 3145728") || !strings.HasSuffix(got, " 2 200") {
			t.Errorf("%q", got)
		}
	})
	t.Run("nghttp", func(t *testing.T) {
		if got := run(t, "nghttp", "-n", "-v", "-m", "20", "-w", "30", "-W", "30", url+"/big"); strings.Count(got, ":status: 200") != 20 || strings.Contains(got, "RST_STREAM") {
			t.Errorf("%d answers: %.2000s", strings.Count(got, ":status: 200"), got)
		}
	})
	t.Run("h2load", func(t *testing.T) {
		for _, args := range [][]string{{"-n", "5000", "-c", "10", "-m", "50", url + "/small"}, {"-n", "100", "-c", "4", "-m", "10", "-w", "16", url + "/big"}} {
			got := run(t, "h2load", args...)
			if !strings.Contains(got, " "+args[1]+" succeeded, 0 failed") || !strings.Contains(got, "status codes: "+args[1]+" 2xx") {
				t.Errorf("h2load %v:\n%s", args, got)
			}
		}
	})
}
