// Package kubernetes gives the end-to-end suites, and a person who wants to try
// Assay, a real Kubernetes of their own inside this machine: etcd, API server,
// controller manager and scheduler, and one to three nodes, each with a kubelet,
// a containerd and a kube-proxy. Nothing is mocked and nothing is downloaded but Go
// modules and Debian packages: Kubernetes, containerd and runc are compiled here, once
// (parts.go), and images are written here, without an engine (image.go).
//
// A machine of the cluster (the control plane is one, and so is each node) is a
// set of namespaces: pid, mount, network, UTS, IPC and cgroup. Its root folder is
// this machine's own, under an overlay in memory, with a disk for what must
// survive a reboot; so everything is where it is on a real node: containerd's
// socket in /run/containerd, the CNI plugins in /opt/cni/bin and their
// configuration in /etc/cni/net.d. Machines meet on a bridge in a network
// namespace that only the cluster has. From outside, the API server is reached
// through a relay on a free port of the loopback interface.
//
// Invariants: no link, rule, mount, process or setting outside the cluster's own
// namespaces is made or changed. What is made outside are a folder in the user's
// cache and one cgroup in each hierarchy, both with the cluster's name. When
// the process that made a cluster ends, however it ends, the kernel ends every
// process of every machine, and with them their namespaces; Close, or the next New,
// removes folder and cgroups. A cluster's name is free as soon as nobody holds the
// lock in its folder.
//
// It refuses to run without root. It needs the CNI plugins, nft, a C compiler and
// libseccomp of Debian (test/packages.txt).
//
// Goroutines: one for each program, ended by the program; one for the relay and two
// for each connection through it, ended by Close.
//
// Tour: cluster.go (a cluster's life), suite.go (what tests call), parts.go (the
// programs), machine.go and init.go (a machine from outside and from inside),
// cgroup.go, network.go, folder.go (names, locks, sweeping), pki.go, control.go and
// node.go (what runs where, with which settings), image.go, addons.go (DNS),
// relay.go, figures.go. cluster/ is the command.
package kubernetes
