package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// Config is everything that an agent is told. Zero fields take the defaults in
// parentheses.
type Config struct {
	// Hosts is control. The agent calls nothing but this. nil: the agent works from
	// the snapshot on disk.
	Hosts api.HostsClient
	// Bundle is told of each new trust bundle before the agent acknowledges it, for
	// whoever verifies control's certificate (see Remote). nil: nobody.
	Bundle func(*api.Bundle) error
	// DataDir holds state that survives a restart (/var/lib/assay/agent).
	DataDir string
	// RuntimeDir holds agent.sock and what running workloads see (/run/assay).
	RuntimeDir string
	// Hidden are folders that no workload gets to see (DataDir and RuntimeDir).
	Hidden []string
	// Listener is agent.sock when it was opened already. The agent closes it.
	Listener *net.UnixListener
	// Metrics serves Prometheus text on /metrics. nil: nowhere. The agent closes it.
	Metrics net.Listener
	// Proxy is the path of assay-proxy (beside the running executable, or in PATH).
	Proxy string
	// Bridge is the name of the host's bridge (assay0). Several agents in one network
	// namespace need different ones.
	Bridge string
	// HostName is for people (the machine's name).
	HostName string
	// Advertise is where other hosts can route this host's workloads to (none).
	Advertise netip.Addr
	// Zone is what the host fails together with, and is near to: a room, an availability
	// zone (none).
	Zone string
	// Upstreams resolve names that are no service's (the host's resolv.conf).
	Upstreams []netip.AddrPort
	// Domain is the suffix of service names: NAME.NAMESPACE.svc.DOMAIN (assay.internal).
	Domain string
	// ProxyUIDs is the first user ID of proxies (900000000). It is used only where the
	// user namespace has it.
	ProxyUIDs uint32
	// OwnMark and ReturnMark are packet marks in the workloads' namespaces
	// (0x41535301, 0x41535302).
	OwnMark, ReturnMark uint32
	// CertificateWait bounds how long a connection waits for the first certificate
	// (2 s).
	CertificateWait time.Duration
	// ProxyDrain bounds how long a proxy that an upgrade has replaced goes on with what
	// cannot move (1 h).
	ProxyDrain time.Duration
	// OlderGrace is how long connections that are older than a workload's capture, and plaintext
	// that its proxy let in before, may go on in a namespace that is strict (10 min).
	OlderGrace time.Duration
	// AccessLog takes a line of JSON for each request that a namespace's configuration
	// asks for, with each Write, which may take its time: nothing waits for it. nil:
	// nothing is logged.
	AccessLog io.Writer
	// OTLP is the URL of a collector of spans, as in http://127.0.0.1:4318. "": none.
	OTLP string
	// EndWorkloads ends all workloads and removes bridge and rules when Run ends.
	// Otherwise they go on and the next agent adopts them.
	EndWorkloads bool
	// Last says that no agent can come after this one, because the network namespace
	// ends with it: however it ends, proxies and commands end too.
	Last bool
	// Pods knows the pods of this host. nil: there are none, and network plugins are told so.
	Pods PodSource
	// Kubelet is the port on which this host's kubelet listens. 0: there is none, and
	// nobody probes pods.
	Kubelet uint16
	// Own says that this agent is in a pod and serves that one alone (MeshOwn). nil: it is on a
	// host.
	Own *Own
	// Outside is where proxies of pods are, if that is not where the agent is.
	Outside *Outside
	// Build is told to control.
	Build string
	// Log takes what a person should know (discarded).
	Log *slog.Logger
}

// defaults of Config.
const (
	DefaultDataDir    = "/var/lib/assay/agent"
	DefaultRuntimeDir = "/run/assay"
	DefaultDomain     = "assay.internal"
	SocketName        = "agent.sock"
	DefaultProxyDrain = time.Hour
	DefaultOlderGrace = 10 * time.Minute
	DefaultOwnMark    = 0x41535301
	proxyName         = "assay-proxy"
)

func (c Config) withDefaults() (Config, error) {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.DataDir, DefaultDataDir)
	def(&c.RuntimeDir, DefaultRuntimeDir)
	def(&c.Bridge, "assay0")
	def(&c.Domain, DefaultDomain)
	if c.ProxyUIDs == 0 {
		c.ProxyUIDs = 900000000
	}
	c.ProxyUIDs = c.Own.users(c.ProxyUIDs)
	if c.OwnMark == 0 {
		c.OwnMark = DefaultOwnMark
	}
	if c.ReturnMark == 0 {
		c.ReturnMark = 0x41535302
	}
	if c.ProxyDrain == 0 {
		c.ProxyDrain = DefaultProxyDrain
	}
	if c.OlderGrace == 0 {
		c.OlderGrace = DefaultOlderGrace
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	if c.HostName == "" {
		if c.HostName, err = os.Hostname(); err != nil {
			return c, fmt.Errorf("host name: %w", err)
		}
	}
	for _, dir := range []*string{&c.DataDir, &c.RuntimeDir} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return c, err
		}
	}
	c.Hidden = slices.Clone(c.Hidden)
	for i := range c.Hidden {
		if c.Hidden[i], err = filepath.Abs(c.Hidden[i]); err != nil {
			return c, err
		}
	}
	if c.Hidden == nil {
		c.Hidden = []string{c.DataDir, c.RuntimeDir}
	}
	if len(c.Bridge) > 15 {
		return c, &assay.Error{Kind: assay.Invalid, Op: "agent", Err: fmt.Errorf("bridge name %q is longer than 15 bytes", c.Bridge)}
	}
	if c.OTLP != "" {
		if u, err := url.Parse(c.OTLP); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return c, &assay.Error{Kind: assay.Invalid, Op: "--otlp " + c.OTLP, Err: errors.New("not an address of OTLP over HTTP"), Remedy: "want http://HOST:4318"}
		}
	}
	if c.OwnMark == c.ReturnMark {
		return c, &assay.Error{Kind: assay.Invalid, Op: "agent", Err: errors.New("the two packet marks are the same")}
	}
	if c.Proxy == "" {
		if c.Proxy, err = findProxy(); err != nil {
			return c, err
		}
	}
	if c.Upstreams == nil {
		c.Upstreams = upstreams()
	}
	return c, nil
}
