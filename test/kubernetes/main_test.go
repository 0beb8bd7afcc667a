package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { kubernetes.Main(m) }

// machineState is what a cluster could leave behind or change on this machine, in
// lines that can be compared. Other clusters may come and go at the same time.
func machineState(t *testing.T, cluster string) []string {
	t.Helper()
	var state []string
	add := func(kind, text string) {
		for line := range strings.Lines(text) {
			state = append(state, kind+" "+strings.TrimSpace(line))
		}
	}
	host, err := lab.OpenSpace(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	for _, cmd := range [][]string{
		{"ip", "-o", "-br", "link"}, {"ip", "-o", "addr", "show", "scope", "global"}, {"ip", "rule"}, {"ip", "netns"},
		{"nft", "list", "tables"},
	} {
		out, err := host.Try(context.Background(), cmd...)
		if err != nil {
			t.Fatal(err)
		}
		add(strings.Join(cmd, " "), out)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	add("mount", string(mounts))
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
		"kernel/keys/root_maxbytes", "net/netfilter/nf_conntrack_max", "net/ipv4/ip_forward", "kernel/hostname",
	} {
		value, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			t.Fatal(err)
		}
		add("setting "+name, string(value))
	}
	for _, pattern := range []string{
		"/sys/fs/cgroup/assay-kubernetes/" + cluster + "-*", "/sys/fs/cgroup/*/assay-kubernetes/" + cluster + "-*", "/var/lib/kubelet", "/var/lib/cni",
		"/etc/cni/net.d/*", "/opt/cni", "/etc/kubernetes", "/run/containerd", "/var/log/pods", "/var/run/netns/*",
		filepath.Join(cache(t), "clusters", cluster),
	} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			state = append(state, "file "+f)
		}
	}
	return state
}

func cache(t *testing.T) string {
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "assay", "kubernetes")
}

// sameAs waits until nothing is there that was not there before: what the kernel
// still has to clear away it clears soon. While others use this machine too, what
// is theirs may come, and goes.
func sameAs(t *testing.T, before []string, cluster string) {
	t.Helper()
	if cluster == "" {
		return // none came up, and the test has failed
	}
	lab.Eventually(t, time.Minute, "this machine is as it was", func() error {
		var left []string
		for _, line := range machineState(t, cluster) {
			if !slices.Contains(before, line) {
				left = append(left, line)
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
		}
		return nil
	})
}
