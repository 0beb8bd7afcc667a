package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Type is the plugin's type, and so the name of its executable.
const Type = "assay-cni"

// Sandbox is a pod's network as the runtime tells it.
type Sandbox struct {
	ID        string // the runtime's
	Namespace string // of the pod
	Name      string // of the pod
	UID       string
	NetNS     string // a path
	Link      string // in that namespace
	Addrs     []netip.Addr
}

// Agent is the node's agent.
type Agent interface {
	// Add meshes the pod if it is to be, and returns when it is.
	Add(context.Context, Sandbox) error
	// Check fails when the pod is to be meshed and is not.
	Check(context.Context, Sandbox) error
	// Del removes what is kept of the pod.
	Del(context.Context, Sandbox) error
	// Ready fails when Add would fail whatever the pod.
	Ready(context.Context) error
}

// Config is the plugin's part of a network configuration.
type Config struct {
	types.NetConf
	// Agent is the path of agent.sock.
	Agent string `json:"agent"`
}

// within bounds one command. Kubernetes gives a sandbox four minutes and tries again.
const within = 30 * time.Second

// errTryAgain is what CNI 1.1 has for a condition that passes.
const errTryAgain = types.ErrTryAgainLater

// codeNotReady is STATUS's "the plugin is not available" of CNI 1.1.
const codeNotReady = 50

// Main runs the plugin as the environment and standard input say, prints the answer, and
// ends the process. dial returns the agent behind a socket.
func Main(dial func(path string) Agent) {
	p := plugin{dial}
	skel.PluginMainFuncs(skel.CNIFuncs{Add: p.add, Check: p.check, Del: p.del, Status: p.status, GC: p.gc}, version.All,
		Type+": tells the node's Assay agent of pods; is chained after the network's own plugin")
}

type plugin struct{ dial func(path string) Agent }

// podArgs are what kubelet's runtimes pass.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID types.UnmarshallableString
}

// read returns the configuration and the sandbox; pod is false for what is not
// Kubernetes', or names no pod.
func read(args *skel.CmdArgs) (cfg Config, s Sandbox, pod bool, err error) {
	if err := json.Unmarshal(args.StdinData, &cfg); err != nil {
		return cfg, s, false, types.NewError(types.ErrDecodingFailure, "the network configuration is no JSON", err.Error())
	}
	if cfg.Agent == "" {
		return cfg, s, false, types.NewError(types.ErrInvalidNetworkConfig, `"agent" is missing`, "it is the path of the agent's socket")
	}
	a := podArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &a); err != nil {
		return cfg, s, false, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS", err.Error())
	}
	s = Sandbox{ID: args.ContainerID, Namespace: string(a.K8S_POD_NAMESPACE), Name: string(a.K8S_POD_NAME), UID: string(a.K8S_POD_UID), NetNS: args.Netns, Link: args.IfName}
	return cfg, s, s.Namespace != "" && s.Name != "", nil
}

// addresses takes the sandbox's own addresses out of what the earlier plugins returned.
func addresses(cfg *Config) (*current.Result, []netip.Addr, error) {
	if err := version.ParsePrevResult(&cfg.NetConf); err != nil {
		return nil, nil, types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	if cfg.PrevResult == nil {
		return nil, nil, types.NewError(types.ErrInvalidNetworkConfig, Type+" is the first plugin of its chain", "it makes no network: put it after the plugin that does")
	}
	r, err := current.NewResultFromResult(cfg.PrevResult)
	if err != nil {
		return nil, nil, types.NewError(types.ErrDecodingFailure, "prevResult", err.Error())
	}
	var list []netip.Addr
	for _, ip := range r.IPs {
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(r.Interfaces) || r.Interfaces[*i].Sandbox == "") {
			continue // of the host's end
		}
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if ok && !slices.Contains(list, a.Unmap()) {
			list = append(list, a.Unmap())
		}
	}
	return r, list, nil
}

func (p plugin) add(args *skel.CmdArgs) error {
	cfg, s, pod, err := read(args)
	if err != nil {
		return err
	}
	r, addrs, err := addresses(&cfg)
	if err != nil {
		return err
	}
	if pod {
		s.Addrs = addrs
		ctx, cancel := context.WithTimeout(context.Background(), within)
		defer cancel()
		if err := p.dial(cfg.Agent).Add(ctx, s); err != nil {
			return failure("mesh", s, err)
		}
	}
	return types.PrintResult(r, cfg.CNIVersion)
}

func (p plugin) check(args *skel.CmdArgs) error {
	cfg, s, pod, err := read(args)
	if err != nil || !pod {
		return err
	}
	_, addrs, err := addresses(&cfg)
	if err != nil {
		return err
	}
	s.Addrs = addrs
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := p.dial(cfg.Agent).Check(ctx, s); err != nil {
		return failure("check", s, err)
	}
	return nil
}

// del must work without a network namespace, without prevResult, and again.
func (p plugin) del(args *skel.CmdArgs) error {
	cfg, s, pod, err := read(args)
	if err != nil || !pod {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := p.dial(cfg.Agent).Del(ctx, s); err != nil && assay.KindOf(err) != assay.Unavailable {
		return failure("end", s, err)
	}
	return nil
}

func (p plugin) status(args *skel.CmdArgs) error {
	cfg, _, _, err := read(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := p.dial(cfg.Agent).Ready(ctx); err != nil {
		return types.NewError(codeNotReady, "the node's Assay agent is not ready", err.Error())
	}
	return nil
}

// gc has nothing to do: the agent compares what it keeps with the pods that there are.
func (p plugin) gc(*skel.CmdArgs) error { return nil }

// failure is what the runtime writes into the pod's events.
func failure(op string, s Sandbox, err error) *types.Error {
	code := uint(types.ErrInternal)
	if assay.KindOf(err) == assay.Unavailable {
		code = errTryAgain
	}
	return types.NewError(code, fmt.Sprintf("assay: %s pod %s/%s", op, s.Namespace, s.Name), strings.TrimSpace(err.Error()))
}
