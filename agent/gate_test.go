package agent

import (
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"golang.org/x/sys/unix"
)

// TestVirtualAddressesOpenAndClose: the kernel refuses a virtual address until an
// endpoint is ready and the proxy has said that it knows; it refuses again at once,
// whatever the proxy says; and what it refuses is counted.
func TestVirtualAddressesOpenAndClose(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	w := a.workload(web.Workload)
	lab.Eventually(t, "the rules are installed", func() bool { return w.capture.Open() != nil })

	vips := lab.Addrs("10.182.0.5", "fd5a:5a59:1::5")
	service := func(targets ...uint16) {
		s := assay.Service{Namespace: "default", Name: "ledger", VIPs: vips, Ports: []assay.Port{{Port: 80}, {Port: 81}}}
		if targets != nil {
			s.Endpoints = []assay.Endpoint{{Workload: "ledger-1", Identity: assay.Identity{TrustDomain: "bank.example", Namespace: "default", Account: "ledger"}, Addrs: lab.Addrs("10.181.7.77"), Targets: targets}}
		}
		c.service(s)
		lab.Eventually(t, "the agent knows", func() bool {
			v := a.view.Load()
			got, ok := v.services["default/ledger"]
			return ok && len(got.service.Endpoints) == len(s.Endpoints) && (targets == nil || got.service.Endpoints[0].Targets[1] == targets[1] && got.service.Endpoints[0].Targets[0] == targets[0])
		})
	}
	dials := uint64(0)
	is := func(port uint16, open bool) bool {
		for _, vip := range vips {
			got, err := talk(web.Namespace, netip.AddrPortFrom(vip, port).String())
			if errors.Is(err, unix.ECONNREFUSED) {
				dials++
			} else if err != nil || !strings.HasPrefix(got, "outbound ") {
				t.Fatalf("%s port %d: %q, %v", vip, port, got, err)
			}
			if (err == nil) != open {
				return false
			}
		}
		return true
	}
	want := func(port uint16, open bool, when string) {
		t.Helper()
		if !is(port, open) {
			t.Errorf("port %d, %s: open is not %v", port, when, open)
		}
	}
	pause := func() (resume func()) {
		pid := proxyOf(t, a.Agent, web.Workload).PID
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) })
		return func() { syscall.Kill(pid, syscall.SIGCONT) }
	}

	want(80, false, "before the service is known")
	service()
	want(80, false, "without endpoints")
	service(0, 8081)
	lab.Eventually(t, "port 81 opens", func() bool { return is(81, true) })
	want(80, false, "with an endpoint that does not listen")

	resume := pause()
	service(8080, 8081)
	want(80, false, "before the proxy has said that it knows")
	resume()
	lab.Eventually(t, "port 80 opens", func() bool { return is(80, true) })

	resume = pause()
	service(0, 8081)
	// The paused proxy does not answer: the rules themselves show what is open.
	at := func(port uint16) bool { return w.capture.Open()[netip.AddrPortFrom(vips[0], port)] }
	lab.Eventually(t, "port 80 closes without the proxy", func() bool { return !at(80) })
	if !at(81) {
		t.Error("port 81 was closed with it")
	}
	want(80, false, "after its endpoint has gone")
	resume()
	want(81, true, "all the time")

	// The next agent finds them as they are.
	open, counted := w.capture.Open(), uint64(0)
	a.stop()
	want(81, true, "without an agent")
	want(80, false, "without an agent")
	metrics, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Metrics, cfg.EndWorkloads = metrics, true
	a = startAgent(t, cfg)
	w = a.workload(web.Workload)
	lab.Eventually(t, "the next agent has taken over", func() bool { return maps.Equal(w.capture.Open(), open) })
	want(81, true, "with the next agent")
	want(80, false, "with the next agent")

	lab.Eventually(t, "control has the count", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		r := c.reports[web.Workload]
		if at := r.GetCounted(); r != nil && time.Since(time.UnixMicro(at)) > time.Minute {
			t.Errorf("counted at %v", time.UnixMicro(at))
		}
		counted = r.GetRefusals()[refusedNoEndpoint]
		return counted == dials
	})
	r, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + metrics.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil || !strings.Contains(string(text), `name="web",reason="kernel-no-endpoint"} `) {
		t.Errorf("metrics, %v, lack the kernel's refusals:\n%s", err, text)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.invalid) > 0 {
		t.Errorf("control would have complained: %v", c.invalid)
	}
}
