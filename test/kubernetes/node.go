package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	cniFolder   = "/usr/lib/cni" // where Debian puts the plugins
	runtimeSock = "/run/containerd/containerd.sock"
	pauseImage  = "assay.test/pause:1"
)

// equipNode writes what a node's programs need to know.
func (c *Cluster) equipNode(m *Machine) error {
	serving, err := c.ca.issue("system:node:"+m.Name, "system:nodes", []string{m.Name}, m.IPv4, m.IPv6)
	if err != nil {
		return err
	}
	errs := errors.Join(
		m.writePair("kubelet", serving),
		m.write(key("ca.crt"), string(c.ca.pem), 0o644),
		c.writeKubeconfig(m, "kubelet", "system:node:"+m.Name, "system:nodes"),
		c.writeKubeconfig(m, "kube-proxy", "system:kube-proxy", ""),
		m.write(key("kubelet.json"), kubeletSettings(c.kind.dns()), 0o644),
		m.write(key("containerd.toml"), containerdSettings, 0o644),
		m.write("/etc/cni/net.d/10-pods.conflist", cniSettings(m.Pods), 0o644),
	)
	// Real files, as on a node on which an installer has put them.
	for _, name := range []string{"bridge", "host-local", "loopback", "portmap"} {
		program, err := os.ReadFile(filepath.Join(cniFolder, name))
		if err != nil {
			return errors.Join(errs, err)
		}
		errs = errors.Join(errs, os.WriteFile(m.Path(filepath.Join("/opt/cni/bin", name)), program, 0o755))
	}
	return errs
}

// startRuntime starts containerd, which can take images before there is an API server.
func (c *Cluster) startRuntime(m *Machine) error {
	return m.start(nil, at("containerd"), "--config", key("containerd.toml"))
}

// startNode starts what needs the API server.
func (c *Cluster) startNode(m *Machine) error {
	return errors.Join(c.startKubelet(m), c.startProxy(m))
}

func (c *Cluster) startProxy(m *Machine) error {
	return m.start(nil, at("kube-proxy"),
		"--kubeconfig="+key("kube-proxy.conf"), "--hostname-override="+m.Name,
		"--proxy-mode="+c.kind.Proxy, "--cluster-cidr="+c.kind.allPods(),
		// Of connection tracking's limits some are the whole machine's.
		"--conntrack-max-per-core=0", "--conntrack-min=0")
}

func (c *Cluster) startKubelet(m *Machine) error {
	hide, err := m.tunables()
	if err != nil {
		return err
	}
	return m.start(hide, at("kubelet"),
		"--config="+key("kubelet.json"), "--kubeconfig="+key("kubelet.conf"),
		"--hostname-override="+m.Name, "--node-ip="+c.kind.of(m))
}

// tunables are settings of the whole kernel that a kubelet wants to have its way
// with. It sees files of its own in their place.
func (m *Machine) tunables() (hide func() error, err error) {
	want := map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0",
		"kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	}
	file := func(name string) string { return "/var/lib/assay/tunables/" + name }
	for name, value := range want {
		if err := m.write(file(name), value+"\n", 0o644); err != nil {
			return nil, err
		}
	}
	return func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("mount namespace: %w", err)
		}
		if err := mount("", "/proc", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		for name := range want {
			if err := mount(file(name), "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// register makes the node's object, with the pods' addresses that its CNI
// configuration has; its kubelet takes it over.
func (c *Cluster) register(ctx context.Context, i int, m *Machine) error {
	var ranges []string
	for _, p := range m.Pods {
		ranges = append(ranges, p.String())
	}
	node := map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{"name": m.Name, "labels": map[string]string{
			"topology.kubernetes.io/region": "here",
			"topology.kubernetes.io/zone":   "zone-" + strconv.Itoa(i),
		}},
		"spec": map[string]any{"podCIDR": ranges[0], "podCIDRs": ranges},
	}
	return c.api(ctx, "POST", "/api/v1/nodes", node, nil)
}

// ready reports why a node is not ready.
func (c *Cluster) ready(ctx context.Context, m *Machine) error {
	var node struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := c.api(ctx, "GET", "/api/v1/nodes/"+m.Name, nil, &node); err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" && condition.Status == "True" {
			return nil
		} else if condition.Type == "Ready" {
			return fmt.Errorf("%s is not ready: %s", m.Name, condition.Message)
		}
	}
	return fmt.Errorf("%s is not ready: its kubelet has said nothing yet", m.Name)
}

func kubeletSettings(dns string) string {
	text, err := json.MarshalIndent(map[string]any{
		"kind": "KubeletConfiguration", "apiVersion": "kubelet.config.k8s.io/v1beta1",
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": key("ca.crt")},
		},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              key("kubelet.crt"),
		"tlsPrivateKeyFile":        key("kubelet.key"),
		"clusterDNS":               []string{dns},
		"clusterDomain":            "cluster.local",
		"resolvConf":               "/etc/resolv.conf",
		"containerRuntimeEndpoint": "unix://" + runtimeSock,
		"cgroupDriver":             "cgroupfs",
		"failCgroupV1":             false,
		"failSwapOn":               false,
		"enforceNodeAllocatable":   []string{},
		"oomScoreAdj":              0, // lowering it needs CAP_SYS_RESOURCE, which a machine may lack
		"evictionHard": map[string]string{
			"memory.available": "50Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%",
		},
		"imageGCHighThresholdPercent": 100,
		"nodeStatusUpdateFrequency":   "5s",
	}, "", "  ")
	if err != nil {
		panic(err) // constants
	}
	return string(text)
}

const containerdSettings = `version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "` + runtimeSock + `"

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"

  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "` + pauseImage + `"

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true

  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"

  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "` + partsDir + `/runc"
        SystemdCgroup = false
`

func cniSettings(ranges []netip.Prefix) string {
	var subnets, routes []string
	for _, r := range ranges {
		subnets = append(subnets, fmt.Sprintf(`[{"subnet": %q}]`, r))
		everything := netip.PrefixFrom(r.Addr(), 0).Masked()
		routes = append(routes, fmt.Sprintf(`{"dst": %q}`, everything))
	}
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
      "ipam": {"type": "host-local", "ranges": [%s], "routes": [%s]}
    }
  ]
}
`, strings.Join(subnets, ", "), strings.Join(routes, ", "))
}
