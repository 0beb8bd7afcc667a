package routes

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// folder is where the manifests are that control watches.
const folder = "/tmp/manifests"

// server is an nginx that answers with its name, or with 500 while a file "broken" is
// beside its configuration.
func server(t *testing.T, w *lab.World, host *lab.Mesh, service, name string) *lab.Workload {
	dir := "/tmp/" + name
	w.Dir(t, dir, "")
	w.Write(t, dir+"/nginx.conf", fmt.Sprintf(`
user root; worker_processes 1; daemon off; error_log stderr warn; pid %[1]s/nginx.pid;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server {
    listen 8080; listen [::]:8080;
    location / { if (-f %[1]s/broken) { return 500; } return 200 "%[2]s\n"; }
  }
}`, dir, name))
	return host.Run(t, service, lab.Spec{Ports: []int{8080}, Command: []string{"nginx", "-p", dir, "-c", dir + "/nginx.conf"}})
}

func broken(t *testing.T, w *lab.World, name string, is bool) {
	t.Helper()
	file := "/tmp/" + name + "/broken"
	if is {
		w.Write(t, file, "")
	} else if err := os.Remove(w.Path(file)); err != nil {
		t.Fatal(err)
	}
}

// answers asks n times over one connection and counts what was answered, by its first
// line or its status.
func answers(t *testing.T, from *lab.Workload, n int, url string) map[string]int {
	t.Helper()
	args := []string{"curl", "-sS", "--max-time", "20", "-w", "%{http_code}\n"}
	for range n {
		args = append(args, url)
	}
	got := map[string]int{}
	for line := range strings.Lines(from.Exec(t, args...).Stdout) {
		if line = strings.TrimSpace(line); line != "200" && line != "" {
			got[line]++
		}
	}
	return got
}

// until waits until n answers in a row are all as wanted.
func until(t *testing.T, what string, from *lab.Workload, n int, url, want string) {
	t.Helper()
	lab.Eventually(t, time.Minute, what, func() error {
		if got := answers(t, from, n, url); got[want] != n {
			return fmt.Errorf("%d times the answers were %v", n, got)
		}
		return nil
	})
}

// shows waits until a command's output has all of the words.
func shows(t *testing.T, w *lab.World, words []string, args ...string) {
	t.Helper()
	lab.Eventually(t, time.Minute, "assay "+strings.Join(args, " "), func() error {
		out := w.MustExec(t, append([]string{w.Mesh.Assay}, args...)...)
		for _, word := range words {
			if !strings.Contains(out, word) {
				return fmt.Errorf("%q lacks %q", out, word)
			}
		}
		return nil
	})
}

// TestProtection: a policy in the manifest folder takes effect in the proxies and is
// withdrawn with its file; what was decided, and who is unfit, is shown.
func TestProtection(t *testing.T) {
	lab.Require(t, "ip", "nft", "nginx", "curl")
	w := &lab.World{Lab: lab.New(t), Mode: lab.Meshed}
	w.Dir(t, folder, "")
	w.Mesh = w.StartMesh(t, "--config", folder, "--zone", "z1")
	t.Cleanup(func() { w.Mesh.Finish(t) })
	server(t, w, w.Mesh, "shop", "shop")
	server(t, w, w.Mesh, "pair", "good")
	server(t, w, w.Mesh, "pair", "bad")
	client := w.Workload(t, "client", lab.Spec{})
	for _, name := range []string{"shop", "pair"} {
		w.AwaitService(t, client, name, 8080)
	}

	t.Run("a policy comes and goes", func(t *testing.T) {
		until(t, "nothing is limited", client, 20, "http://shop:8080/", "shop")
		w.Write(t, folder+"/shop.yaml", `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: shop, namespace: default}
spec:
  targetRefs: [{kind: Service, name: shop}]
  inbound: {rateLimit: {requests: 1, interval: 1h, burst: 3}}
`)
		until(t, "the policy is in effect", client, 20, "http://shop:8080/", "429")
		shows(t, w, []string{"shop"}, "get", "trafficpolicies")
		shows(t, w, []string{"rate-limited"}, "stat", "shop", "--interval", "0")
		shows(t, w, []string{"rate-limited"}, "describe", "service", "shop")
		// One that cannot be read leaves the last one in effect.
		w.Write(t, folder+"/shop.yaml", "apiVersion: assay.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: shop, namespace: default}\nspec: {targetRefs: [{name: shop}], slowStart: soon}\n")
		lab.Eventually(t, time.Minute, "the fault is shown", func() error {
			if out := w.Exec(t, w.Mesh.Assay, "check"); !strings.Contains(out.Stdout, "slowStart") {
				return errors.New(out.Stdout)
			}
			return nil
		})
		if got := answers(t, client, 20, "http://shop:8080/"); got["429"] != 20 {
			t.Errorf("with a policy that cannot be read the answers were %v", got)
		}
		if err := os.Remove(w.Path(folder + "/shop.yaml")); err != nil {
			t.Fatal(err)
		}
		until(t, "the policy is withdrawn", client, 20, "http://shop:8080/", "shop")
	})
	t.Run("who is unfit is shown", func(t *testing.T) {
		w.Write(t, folder+"/pair.yaml", `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: pair, namespace: default}
spec:
  targetRefs: [{name: pair}, {name: shop}]
  ejection: {consecutiveFailures: 2, baseTime: 10m, maxTime: 10m}
  slowStart: 0s
  circuit: {consecutiveFailures: 5, baseTime: 10m, maxTime: 10m}
`)
		lab.Eventually(t, time.Minute, "both are given requests", func() error {
			if got := answers(t, client, 20, "http://pair:8080/"); got["good"] == 0 || got["bad"] == 0 {
				return fmt.Errorf("the answers were %v", got)
			}
			return nil
		})
		shows(t, w, []string{"pair"}, "get", "trafficpolicies")
		broken(t, w, "bad", true)
		lab.Eventually(t, time.Minute, "the endpoint is ejected", func() error {
			answers(t, client, 20, "http://pair:8080/") // the other one may be preferred, as it is quicker
			if out := w.MustExec(t, w.Mesh.Assay, "stat", "pair", "--interval", "0"); !strings.Contains(out, "eject") {
				return errors.New(out)
			}
			return nil
		})
		until(t, "it is asked no more", client, 20, "http://pair:8080/", "good")
		shows(t, w, []string{"Unfit endpoints", "2 failures in a row", "default/client", "eject"}, "describe", "service", "pair")

		broken(t, w, "shop", true)
		until(t, "the circuit is open", client, 20, "http://shop:8080/", "503")
		shows(t, w, []string{"Unfit endpoints", "(service)", "5 failures in a row", "circuit-open", "circuit-refused"}, "describe", "service", "shop")
		shows(t, w, []string{"circuit-refused"}, "stat", "shop", "--interval", "0")
		broken(t, w, "shop", false)
		if got := answers(t, client, 5, "http://shop:8080/"); got["503"] != 5 {
			t.Errorf("with the circuit open the answers were %v", got)
		}
		// Without the policy nothing keeps it open.
		if err := os.Remove(w.Path(folder + "/pair.yaml")); err != nil {
			t.Fatal(err)
		}
		until(t, "the circuit is gone", client, 20, "http://shop:8080/", "shop")
	})
}

// TestZones: who is in the client's zone is preferred, as long as it is fit.
func TestZones(t *testing.T) {
	lab.Require(t, "ip", "nft", "nginx", "curl")
	w := lab.NewRoles(t)
	near, far := w.Mesh.SecondHost(t, "machine2", "--zone", "east"), w.Mesh.SecondHost(t, "machine3", "--zone", "west")
	server(t, w, near, "shop", "near")
	server(t, w, far, "shop", "far")
	client := near.Run(t, "client", lab.Spec{})
	w.AwaitService(t, client, "shop", 8080)
	lab.Eventually(t, time.Minute, "both endpoints are ready", func() error {
		if out := w.MustExec(t, w.Mesh.Assay, "get", "services", "-o", "json"); !strings.Contains(out, `"east"`) || !strings.Contains(out, `"west"`) {
			return errors.New(out)
		}
		return nil
	})
	policy := func(more string) {
		file := w.Write(t, "/tmp/policy.yaml", `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: shop, namespace: default}
spec:
  targetRefs: [{name: shop}]
  ejection: {consecutiveFailures: 2, baseTime: 1s, maxTime: 1s}
  slowStart: 0s
`+more)
		w.MustExec(t, w.Mesh.Assay, "apply", "-f", file)
	}
	const url = "http://shop:8080/"
	policy("")
	// If zones did not count, that would be one in a million.
	until(t, "those near are preferred", client, 20, url, "near")
	broken(t, w, "near", true)
	lab.Eventually(t, time.Minute, "those far stand in", func() error {
		if got := answers(t, client, 20, url); got["far"] < 10 {
			return fmt.Errorf("the answers were %v", got)
		}
		return nil
	})
	shows(t, w, []string{"failover"}, "stat", "shop", "--interval", "0")
	broken(t, w, "near", false)
	until(t, "those near are back", client, 20, url, "near")
	policy("  locality: Any\n")
	lab.Eventually(t, time.Minute, "zones count no more", func() error {
		if got := answers(t, client, 40, url); got["near"] < 5 || got["far"] < 5 {
			return fmt.Errorf("the answers were %v", got)
		}
		return nil
	})
}
