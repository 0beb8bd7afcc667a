package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"strings"
)

const apiPort = 6443

// at is the path of a program of the cluster inside a machine.
func at(program string) string { return path.Join(partsDir, program) }

// key is the path of a file with keys or settings inside a machine.
func key(name string) string { return path.Join(keysDir, name) }

// writePair writes NAME.crt and NAME.key.
func (m *Machine) writePair(name string, p pair) error {
	return errors.Join(m.write(key(name+".crt"), string(p.cert), 0o644), m.write(key(name+".key"), string(p.key), 0o600))
}

// equipControl writes what the programs of the control plane need to know.
func (c *Cluster) equipControl() error {
	m := c.Control
	server, err := c.ca.issue("kube-apiserver", "", []string{
		"localhost", m.Name, "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}, m.IPv4, m.IPv6, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1"),
		services[0].Addr().Next(), services[1].Addr().Next()) // its service's
	if err != nil {
		return err
	}
	toKubelets, err := c.ca.issue("kube-apiserver-kubelet-client", "system:masters", nil)
	if err != nil {
		return err
	}
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	accountsKey, err := keyInPEM(accounts)
	if err != nil {
		return err
	}
	caKey, err := keyInPEM(c.ca.key)
	if err != nil {
		return err
	}
	errs := errors.Join(
		m.writePair("apiserver", server), m.writePair("apiserver-kubelet-client", toKubelets),
		m.writePair("ca", pair{c.ca.pem, caKey}),
		m.write(key("service-accounts.key"), string(accountsKey), 0o600))
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		errs = errors.Join(errs, c.writeKubeconfig(m, name, "system:"+name, ""))
	}
	return errs
}

// writeKubeconfig writes NAME.conf for a program on the machine.
func (c *Cluster) writeKubeconfig(m *Machine, name, user, group string) error {
	server := "https://" + netip.AddrPortFrom(c.Control.IPv4, apiPort).String()
	text, err := c.ca.kubeconfig(c.name, server, user, group)
	if err != nil {
		return err
	}
	return m.write(key(name+".conf"), text, 0o600)
}

// startControl starts what the API server needs, and it.
func (c *Cluster) startControl() error {
	return errors.Join(c.startProgram("etcd"), c.startProgram("kube-apiserver"))
}

// startManagers starts what needs the API server.
func (c *Cluster) startManagers() error {
	return errors.Join(c.startProgram("kube-controller-manager"), c.startProgram("kube-scheduler"))
}

// startProgram starts one of the control plane's programs.
func (c *Cluster) startProgram(name string) error {
	m := c.Control
	serviceRange := c.kind.serviceRanges()
	own, _, _ := strings.Cut(c.kind.of(m), ",")
	settings := map[string][]string{
		"etcd": {
			"--name=" + m.Name, "--data-dir=/var/lib/etcd/data",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=" + m.Name + "=http://127.0.0.1:2380",
			"--log-level=warn",
			// A test's cluster is worth nothing after this machine has crashed.
			"--unsafe-no-fsync",
		},
		"kube-apiserver": {
			"--etcd-servers=http://127.0.0.1:2379",
			"--advertise-address=" + own, "--bind-address=::", fmt.Sprintf("--secure-port=%d", apiPort),
			"--client-ca-file=" + key("ca.crt"),
			"--tls-cert-file=" + key("apiserver.crt"), "--tls-private-key-file=" + key("apiserver.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + key("service-accounts.key"),
			"--service-account-signing-key-file=" + key("service-accounts.key"),
			"--service-cluster-ip-range=" + serviceRange,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--kubelet-client-certificate=" + key("apiserver-kubelet-client.crt"),
			"--kubelet-client-key=" + key("apiserver-kubelet-client.key"),
			"--kubelet-certificate-authority=" + key("ca.crt"),
			"--kubelet-preferred-address-types=InternalIP",
			// It is outside the nodes, where nobody translates the addresses of services.
			"--enable-aggregator-routing=true",
			"--profiling=false",
		},
		"kube-controller-manager": {
			"--kubeconfig=" + key("kube-controller-manager.conf"),
			"--authentication-kubeconfig=" + key("kube-controller-manager.conf"),
			"--authorization-kubeconfig=" + key("kube-controller-manager.conf"),
			"--service-account-private-key-file=" + key("service-accounts.key"), "--root-ca-file=" + key("ca.crt"),
			"--cluster-signing-cert-file=" + key("ca.crt"), "--cluster-signing-key-file=" + key("ca.key"),
			"--use-service-account-credentials=true", "--leader-elect=false",
			"--kube-api-qps=500", "--kube-api-burst=1000", // it makes an account for each of its controllers first
			"--allocate-node-cidrs=false", // the nodes are made with theirs
			"--service-cluster-ip-range=" + serviceRange,
			"--profiling=false",
		},
		"kube-scheduler": {
			"--kubeconfig=" + key("kube-scheduler.conf"),
			"--authentication-kubeconfig=" + key("kube-scheduler.conf"),
			"--authorization-kubeconfig=" + key("kube-scheduler.conf"),
			"--leader-elect=false",
			"--profiling=false",
		},
	}
	return m.start(nil, append([]string{at(name)}, settings[name]...)...)
}
