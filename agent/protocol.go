package agent

import (
	"errors"
	"net/netip"

	"assay.dev"
	"assay.dev/link"
)

// Kinds of messages between `assay run` and the agent, on agent.sock. The order of a
// run: run -> run-ready (with the namespace's descriptor), run-started (with a pidfd),
// [run-draining], run-ended -> run-over. The connection stays open as long as the
// command runs; when the agent is gone, `assay run` dials until there is one again and
// sends run-resume (with pidfd and namespace).
const (
	kindWhere    link.Kind = "where"        // empty -> where
	kindRun      link.Kind = "run"          // RunRequest
	kindReady    link.Kind = "run-ready"    // Placed, with the namespace
	kindFailed   link.Kind = "run-failed"   // failure: the answer to run and run-resume
	kindStarted  link.Kind = "run-started"  // empty, with the command's pidfd
	kindDraining link.Kind = "run-draining" // empty: it was asked to stop
	kindEnded    link.Kind = "run-ended"    // empty: the command has ended
	kindResume   link.Kind = "run-resume"   // resume, with pidfd and namespace -> run-ready without it
	kindOver     link.Kind = "run-over"     // over: everything is removed
)

// Kinds of messages between a network plugin and the agent, on agent.sock: a Sandbox is
// answered with sandbox-done or run-failed.
const (
	kindSandboxAdd   link.Kind = "sandbox-add"
	kindSandboxCheck link.Kind = "sandbox-check"
	kindSandboxDel   link.Kind = "sandbox-del"
	kindSandboxReady link.Kind = "sandbox-ready" // empty
	kindSandboxDone  link.Kind = "sandbox-done"  // empty
)

// RunRequest asks for a place for a command.
type RunRequest struct {
	Namespace string            `json:"namespace"`
	Service   string            `json:"service"`
	Account   string            `json:"account,omitempty"` // the service's name when empty
	Ports     []uint16          `json:"ports,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Artifact  string            `json:"artifact,omitempty"` // absolute path of a tree
}

// Placed is a place for a command: a network namespace with addresses, rules and a
// proxy that accepts.
type Placed struct {
	Workload string         `json:"workload"`
	Identity assay.Identity `json:"identity"`
	Addrs    []netip.Addr   `json:"addrs"`
	// ResolvConf is a file to mount over /etc/resolv.conf.
	ResolvConf string `json:"resolvConf"`
	// Hidden are folders that the command must not see.
	Hidden []string `json:"hidden,omitempty"`
	// Last says that no agent comes after this one.
	Last bool `json:"last,omitempty"`
	// Warning is what the person should know, "" for nothing.
	Warning string `json:"warning,omitempty"`
}

// Where tells how to reach an agent's namespaces.
type Where struct {
	PID int `json:"pid"`
	// Rootless agents live in a user namespace that must be entered first.
	Rootless bool `json:"rootless"`
}

type resume struct {
	Workload string `json:"workload"`
}

type over struct {
	Reason string `json:"reason,omitempty"` // why, when it was not the command that ended
}

// failure is an assay.Error on the wire.
type failure struct {
	Kind   assay.Kind `json:"kind"`
	Op     string     `json:"op"`
	Cause  string     `json:"cause"`
	Remedy string     `json:"remedy,omitempty"`
}

func failureOf(op string, err error) failure {
	if e, ok := errors.AsType[*assay.Error](err); ok {
		f := failure{Kind: e.Kind, Op: e.Op, Remedy: e.Remedy}
		if e.Err != nil {
			f.Cause = e.Err.Error()
		}
		return f
	}
	return failure{Kind: assay.Internal, Op: op, Cause: err.Error()}
}

func (f failure) error() error {
	e := &assay.Error{Kind: f.Kind, Op: f.Op, Remedy: f.Remedy}
	if f.Cause != "" {
		e.Err = errors.New(f.Cause)
	}
	return e
}
