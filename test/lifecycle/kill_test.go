package lifecycle

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// TestControlKilled: traffic, new connections and names go on; a restarted control
// takes the host back.
func TestControlKilled(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewRoles(t)
	client, server := pair(t, w)
	open := mustConverse(t, client, "shop")
	w.Mesh.Control.Kill()
	must(t, "an open connection with control dead", open.say())
	for range 5 {
		must(t, "anew with control dead", everything(t, client))
	}
	before := w.Mesh.Proxy(server)
	w.Mesh.StartControl(t)
	must(t, "anew with control back", everything(t, client))
	// It takes new workloads, and they find the old ones.
	late := w.Workload(t, "late", lab.Spec{})
	w.AwaitService(t, late, "shop", portHTTP)
	must(t, "an open connection with control back", open.say())
	if now := w.Mesh.Proxy(server); now != before {
		t.Errorf("the server's proxy was replaced (%d, %d)", before, now)
	}
}

// TestAgentKilled: the same without an agent, which then adopts what runs.
func TestAgentKilled(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	for _, form := range []struct {
		name string
		make func(t lab.TB) *lab.World
	}{
		{"roles apart", func(t lab.TB) *lab.World { return lab.NewRoles(t) }},
		{"assay up", func(t lab.TB) *lab.World { return lab.NewWorld(t, lab.Meshed) }},
	} {
		t.Run(form.name, func(t *testing.T) {
			w := form.make(t)
			client, server := pair(t, w)
			open := mustConverse(t, client, "shop")
			proxies := [2]int{w.Mesh.Proxy(client), w.Mesh.Proxy(server)}
			// At once: what the agent has not written to disk yet is lost with it, and what
			// its workloads know must not be.
			w.Mesh.Agent.Kill()
			must(t, "an open connection with the agent dead", open.say())
			for range 5 {
				must(t, "anew with the agent dead", everything(t, client))
			}
			w.Mesh.StartAgent(t)
			lab.Eventually(t, 30*time.Second, "the proxies are adopted", func() error {
				for _, x := range []*lab.Workload{client, server} {
					if err := w.Mesh.Listed(t, x.Name); err != nil {
						return err
					}
				}
				return nil
			})
			must(t, "an open connection after adoption", open.say())
			must(t, "anew after adoption", everything(t, client))
			if now := [2]int{w.Mesh.Proxy(client), w.Mesh.Proxy(server)}; now != proxies {
				t.Errorf("proxies %v were replaced by %v", proxies, now)
			}
			// The new agent is the workloads' agent in all: it places new ones, revives
			// proxies, and ends what ends.
			late := w.Workload(t, "late", lab.Spec{})
			w.AwaitService(t, late, "shop", portHTTP)
			revived(t, w, server)
			must(t, "anew with a revived proxy", everything(t, client))
			if code, willingly := server.Main.Stop(5 * time.Second); !willingly {
				t.Errorf("assay run of an adopted workload did not end when asked (exit code %d)", code)
			}
			gone(t, w, server)
		})
	}
}

// revived kills a workload's proxy and waits for its successor.
func revived(t *testing.T, w *lab.World, x *lab.Workload) time.Duration {
	t.Helper()
	old := w.Mesh.Proxy(x)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatalf("kill the proxy of %s: %v", x.Name, err)
	}
	began := time.Now()
	lab.Eventually(t, 30*time.Second, "another proxy for "+x.Name, func() error {
		if now := w.Mesh.Proxy(x); now == 0 || now == old {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	return time.Since(began)
}

// gone waits until nothing of a workload is left.
func gone(t *testing.T, w *lab.World, x *lab.Workload) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, x.Name+" is gone", func() error {
		if pid := w.Mesh.Proxy(x); pid != 0 {
			return fmt.Errorf("its proxy runs (%d)", pid)
		}
		if err := w.Mesh.Listed(t, x.Name); err == nil {
			return errors.New("it is listed")
		}
		return nil
	})
}

// TestProxyKilled: back within a second, and in strict mode nothing passes in
// plaintext meanwhile.
func TestProxyKilled(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	const marker = "PLAIN-IN-STRICT-5521"
	w := lab.NewWorld(t, lab.Meshed)
	w.Mesh.Strict(t, "default")
	outsider := w.Node(t, "outsider")
	client, server := pair(t, w)
	capture := w.Capture(t, marker)
	stop := make(chan struct{})
	tried := make(chan int)
	go func() {
		// Somebody outside tries all the time to be answered in plaintext.
		n, answered := 0, 0
		for {
			select {
			case <-stop:
				tried <- answered
				return
			default:
			}
			if v, err := converse(&lab.Workload{Space: outsider.Space, Name: "outsider"}, addrPort(server, portEcho)); err == nil {
				answered++
				v.c.Close()
			}
			n++
		}
	}()
	for _, x := range []*lab.Workload{server, client} {
		fastest := time.Hour // the machine may be busy with something else
		for range 3 {
			began := time.Now()
			revived(t, w, x)
			lab.Eventually(t, 30*time.Second, "the pair talks", func() error {
				v, err := converse(client, client.Target(t, "shop", portEcho))
				if err != nil {
					return err
				}
				defer v.c.Close()
				_, err = v.c.Write([]byte(strings.Repeat(marker, 10) + "\n"))
				return errors.Join(err, v.say2())
			})
			took := time.Since(began)
			t.Logf("proxy of %s killed: answers again after %s", x.Name, took.Round(time.Millisecond))
			fastest = min(fastest, took)
		}
		if fastest > time.Second {
			t.Errorf("kills of the proxy of %s: answers again after %s at best, want a second at most", x.Name, fastest)
		}
	}
	close(stop)
	if n := <-tried; n > 0 {
		t.Errorf("in strict mode plaintext from outside was answered %d times", n)
	}
	capture.ExpectNone(t)
}

// say2 reads one echoed line of any content.
func (v *conversation) say2() error {
	_, err := v.r.ReadString('\n')
	return err
}
