package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/link"
)

// PodSource knows the pods of this host.
type PodSource interface {
	// Pod returns what is known of a pod whose network is just being made, and whether it
	// is to be meshed. The pod needs neither addresses nor a network namespace. uid may be
	// empty. An error means that it is not known.
	Pod(ctx context.Context, namespace, name, uid string) (p Pod, meshed bool, err error)
	// Unmeshed lists the pods that are labelled to be meshed and cannot be, by namespace and name.
	Unmeshed() []Unmeshed
	// Unchained is why pods that start do not wait for the agent, but are captured only as
	// they run; nil where they wait.
	Unchained() error
}

// Unmeshed is a pod that is labelled to be meshed and cannot be.
type Unmeshed struct {
	Pod, Namespace, Name string    // Pod is its ID; "" is every new one of the host
	Reason               string    // in a word: for metrics
	Since                time.Time // it was tried first; zero: nobody tries, since it never can be
	Err                  error     // of the last attempt, or why not
}

const (
	unmeshedLook = 5 * time.Second
	// unmeshedFor is how long one may take before it is a finding: an agent that has just
	// begun, or a runtime that is slow, is none.
	unmeshedFor = 10 * time.Second
	// unmeshedAgain is how often it is told: control shows what was told in the last hour.
	unmeshedAgain = 10 * time.Minute
	// unmeshedStays is that of one that nobody tries.
	unmeshedStays = 30 * time.Minute
	// unchainedFor is how much longer a new node's network may take to be configured.
	unchainedFor = time.Minute
)

// tellUnmeshed makes findings of pods that cannot be meshed, until ctx ends.
func (a *Agent) tellUnmeshed(ctx context.Context) {
	t := tellings{}
	tick := time.NewTicker(unmeshedLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		list := a.cfg.Pods.Unmeshed()
		if err := a.cfg.Pods.Unchained(); err != nil {
			list = append(slices.Clone(list), Unmeshed{Name: a.cfg.HostName, Err: err})
		}
		for _, u := range t.due(list, now) {
			f := u.finding(now)
			a.outbox.finding(&f)
		}
	}
}

// tellings are of pods that were listed the last time.
type tellings map[string]telling

type telling struct{ listed, told time.Time }

// due are the pods that are to be told now.
func (t tellings) due(list []Unmeshed, now time.Time) (due []Unmeshed) {
	for id := range t {
		if !slices.ContainsFunc(list, func(u Unmeshed) bool { return u.Pod == id }) {
			delete(t, id)
		}
	}
	for _, u := range list {
		x, known := t[u.Pod]
		if !known {
			x.listed = now
		}
		since, again := u.Since, unmeshedAgain
		if since.IsZero() { // control has to hear of it, too
			since, again = x.listed, unmeshedStays
		}
		if u.Pod == "" {
			since = since.Add(unchainedFor)
		}
		if now.Sub(since) >= unmeshedFor && now.Sub(x.told) >= again {
			x.told = now
			due = append(due, u)
		}
		t[u.Pod] = x
	}
	return due
}

func (u *Unmeshed) finding(now time.Time) assay.Finding {
	f := assay.Finding{Time: now, Workload: u.Pod, Kind: "pod-not-meshed", Subject: u.Namespace + "/" + u.Name, Detail: u.Err.Error()}
	if e, ok := u.Err.(*assay.Error); ok {
		cause := *e
		cause.Remedy = ""
		f.Detail, f.Remedy = cause.Error(), e.Remedy
	}
	if u.Pod == "" {
		f.Kind, f.Subject = "plugin-not-chained", "node "+u.Name
	}
	return f
}

// Sandbox is the network of a pod, as a container runtime's plugin tells it.
type Sandbox struct {
	ID        string       `json:"id"` // the runtime's
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	UID       string       `json:"uid,omitempty"`
	NetNS     string       `json:"netns,omitempty"`
	Link      string       `json:"link,omitempty"`
	Addrs     []netip.Addr `json:"addrs,omitempty"`
}

// sandbox answers a network plugin.
func (a *Agent) sandbox(ctx context.Context, conn *link.Conn, m link.Message, peer *attest.Process, uid uint32) {
	err := a.mayRun(peer, uid)
	if err == nil && a.cfg.Pods == nil {
		err = &assay.Error{Kind: assay.Invalid, Op: "answer a network plugin", Err: errors.New("this agent has no pods"), Remedy: "take assay-cni out of the network configuration"}
	}
	if err == nil && m.Kind != kindSandboxReady {
		var s Sandbox
		if err = m.Decode(&s); err == nil {
			err = a.sandboxDo(ctx, m.Kind, s)
		}
	} else if err == nil && !a.ready.is() {
		err = &assay.Error{Kind: assay.Unavailable, Op: "answer a network plugin", Err: errors.New("the agent has not started yet")}
	}
	if err != nil {
		conn.Send(kindFailed, m.ID, failureOf("sandbox", err))
		return
	}
	conn.Send(kindSandboxDone, m.ID, nil)
}

func (a *Agent) sandboxDo(ctx context.Context, kind link.Kind, s Sandbox) error {
	if kind == kindSandboxDel {
		// The source may not know a pod that is gone. A runtime ends a sandbox again and again,
		// also when the pod has another one by then.
		for _, w := range a.all() {
			if w.given && w.inSandbox(s.ID) {
				return a.PodEnded(ctx, w.id)
			}
		}
		return nil
	}
	p, meshed, err := a.cfg.Pods.Pod(ctx, s.Namespace, s.Name, s.UID)
	if err != nil || !meshed {
		return err
	}
	if kind == kindSandboxCheck {
		w := a.workload(p.ID)
		if w == nil || w.life.Err() != nil || w.given && !w.inSandbox(s.ID) {
			return &assay.Error{Kind: assay.NotFound, Op: fmt.Sprintf("check pod %s/%s", s.Namespace, s.Name), Err: errors.New("it should be meshed and is not")}
		}
		return w.capture.Verify()
	}
	p.Sandbox, p.NetNS, p.Link, p.Addrs = s.ID, s.NetNS, s.Link, s.Addrs
	return a.Mesh(ctx, p)
}

func (w *workload) inSandbox(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return id != "" && w.rec.Given.Sandbox == id
}

// Sandboxes is the agent behind a socket, for a network plugin.
type Sandboxes struct{ Socket string }

// Add meshes a pod if it is to be, and returns when it is.
func (s Sandboxes) Add(ctx context.Context, x Sandbox) error { return s.ask(ctx, kindSandboxAdd, x) }

// Check fails when a pod should be meshed and is not.
func (s Sandboxes) Check(ctx context.Context, x Sandbox) error {
	return s.ask(ctx, kindSandboxCheck, x)
}

// Del removes what is kept of a pod.
func (s Sandboxes) Del(ctx context.Context, x Sandbox) error { return s.ask(ctx, kindSandboxDel, x) }

// Ready fails when the agent cannot mesh pods.
func (s Sandboxes) Ready(ctx context.Context) error { return s.ask(ctx, kindSandboxReady, nil) }

func (s Sandboxes) ask(ctx context.Context, kind link.Kind, body any) error {
	conn, err := dialAgent(s.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Socket().SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	m, err := question(conn, kind, body)
	m.Discard()
	if ctx.Err() != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "ask the agent at " + s.Socket, Err: context.Cause(ctx)}
	}
	return err
}
