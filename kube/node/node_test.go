package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"assay.dev"
	"assay.dev/kube/cri"
)

func TestWanted(t *testing.T) {
	yes, no := map[string]string{MeshLabel: Enabled}, map[string]string{MeshLabel: Disabled}
	for name, c := range map[string]struct {
		pod    Pod
		labels map[string]string
		want   bool
	}{
		"neither says a word":            {Pod{Namespace: "bank"}, nil, false},
		"the namespace":                  {Pod{Namespace: "bank"}, yes, true},
		"the pod":                        {Pod{Namespace: "bank", Labels: yes}, nil, true},
		"the pod against the namespace":  {Pod{Namespace: "bank", Labels: no}, yes, false},
		"for it, against the namespace":  {Pod{Namespace: "bank", Labels: yes}, no, true},
		"a word that means nothing":      {Pod{Namespace: "bank", Labels: map[string]string{MeshLabel: "yes"}}, yes, true},
		"with a sidecar of its own":      {Pod{Namespace: "bank", Labels: map[string]string{MeshLabel: "sidecar"}}, yes, false},
		"in a namespace of sidecars":     {Pod{Namespace: "bank"}, map[string]string{MeshLabel: "sidecar"}, false},
		"of a namespace, means nothing":  {Pod{Namespace: "bank"}, map[string]string{MeshLabel: "true"}, false},
		"on the node's network":          {Pod{Namespace: "bank", Labels: yes, hostNetwork: true}, yes, false},
		"ended":                          {Pod{Namespace: "bank", Labels: yes, ended: true}, yes, false},
		"static":                         {Pod{Namespace: "bank", Labels: yes, static: true}, yes, false},
		"Assay's own":                    {Pod{Namespace: "assay-system", Labels: yes}, yes, false},
		"the cluster's":                  {Pod{Namespace: "kube-system"}, yes, false},
		"the cluster's, by its own word": {Pod{Namespace: "kube-system", Labels: yes}, nil, true},
	} {
		if got := c.pod.wanted(DefaultSystem, c.labels); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestTranslate(t *testing.T) {
	memory := func(s string) corev1.ResourceRequirements {
		return corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(s)}}
	}
	p := translate(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: types.UID("u-1"), Namespace: "bank", Name: "web-0"},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 9000}}}},
			Containers: []corev1.Container{
				{Resources: memory("256Mi"), Ports: []corev1.ContainerPort{{ContainerPort: 8080}, {ContainerPort: 53, Protocol: corev1.ProtocolUDP}, {ContainerPort: 443, Protocol: corev1.ProtocolTCP}}},
				{
					Resources: memory("512Mi"), Ports: []corev1.ContainerPort{{ContainerPort: 8080, Name: "http"}},
					ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromString("http")}}},
					LivenessProbe:  &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(9001)}}},
					StartupProbe:   &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: "elsewhere", Port: intstr.FromInt32(9002)}}},
				},
			},
		},
		Status: corev1.PodStatus{QOSClass: corev1.PodQOSBurstable, PodIPs: []corev1.PodIP{{IP: "fd00::7"}, {IP: "10.244.0.7"}, {IP: "?"}}},
	}, 1<<30)
	if fmt.Sprint(p.Probes) != "[8080 9001]" {
		t.Errorf("probes at %v", p.Probes)
	}
	if p.Account != "default" || p.OOMScore != 500 || fmt.Sprint(p.Ports) != "[443 8080 9000]" || fmt.Sprint(p.Addrs) != "[10.244.0.7 fd00::7]" {
		t.Errorf("%+v", p)
	}
	critical := int32(2000001000)
	for name, c := range map[string]struct {
		pod  corev1.Pod
		want int
	}{
		"best effort":       {corev1.Pod{Status: corev1.PodStatus{QOSClass: corev1.PodQOSBestEffort}}, 1000},
		"guaranteed":        {corev1.Pod{Status: corev1.PodStatus{QOSClass: corev1.PodQOSGuaranteed}}, -997},
		"critical":          {corev1.Pod{Spec: corev1.PodSpec{Priority: &critical}, Status: corev1.PodStatus{QOSClass: corev1.PodQOSBestEffort}}, -997},
		"asks for no more":  {corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{}}}, Status: corev1.PodStatus{QOSClass: corev1.PodQOSBurstable}}, 999},
		"asks for too much": {corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Resources: memory("5Gi")}}}, Status: corev1.PodStatus{QOSClass: corev1.PodQOSBurstable}}, 3},
	} {
		if got := oomScore(&c.pod, 1<<30); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func sandbox(id string, images ...string) cri.Sandbox {
	s := cri.Sandbox{ID: id, NetNS: "/run/netns/" + id}
	for _, name := range images {
		s.Containers = append(s.Containers, cri.Container{Name: name, Image: cri.Image{Name: name, Manifest: assay.DigestOf([]byte(name))}})
	}
	return s
}

// TestPlan: what is done for a pod by what is known of it.
func TestPlan(t *testing.T) {
	now := time.Now()
	web := sandbox("s1", "web")
	in := Known{Pod: Pod{UID: "u"}, Wanted: true}
	out := Known{Pod: Pod{UID: "u"}}
	over := Known{Pod: Pod{UID: "u"}, Ended: true}
	meshed := &progress{sandbox: "s1"}
	attested := &progress{sandbox: "s1", attested: web.Artifacts()}
	for name, c := range map[string]struct {
		pod     *Known
		sandbox *cri.Sandbox
		meshed  bool
		away    bool // the API server
		known   *progress
		want    verb
	}{
		"wanted":                             {&in, &web, false, false, nil, meshIt},
		"not wanted":                         {&out, &web, false, false, nil, ""},
		"not known yet":                      {nil, &web, false, false, nil, ""},
		"wanted, of the last agent":          {&in, &web, true, false, nil, meshIt},
		"in another sandbox":                 {&in, &web, true, false, &progress{sandbox: "s0"}, meshIt},
		"its proxy was given up":             {&in, &web, false, false, attested, meshIt},
		"what it runs is new":                {&in, &web, true, false, meshed, attestIt},
		"nothing runs yet":                   {&in, new(sandbox("s1")), true, false, meshed, ""},
		"all is well":                        {&in, &web, true, false, attested, ""},
		"another container":                  {&in, new(sandbox("s1", "debug", "web")), true, false, attested, attestIt},
		"another, while the server is away":  {nil, new(sandbox("s1", "debug", "web")), true, true, attested, attestIt},
		"wanted no more":                     {&out, &web, true, false, attested, releaseIt},
		"wanted no more, as the server said": {&out, &web, true, true, attested, ""},
		"leaves":                             {&out, &web, true, false, &progress{released: true}, ""},
		"ended, its sandbox goes soon":       {&over, &web, true, false, attested, ""},
		"deleted, its sandbox goes soon":     {nil, &web, true, false, attested, ""},
		"ended":                              {&over, nil, true, false, attested, endIt},
		"deleted":                            {nil, nil, true, false, nil, endIt},
		"gone, says nobody":                  {nil, nil, true, true, nil, ""},
		"its sandbox is being made":          {&in, nil, true, false, nil, ""},
		"busy":                               {&in, &web, false, false, &progress{busy: true}, ""},
		"failed before":                      {&in, &web, false, false, &progress{failures: 1, next: now}, meshIt},
		"failed just now":                    {&in, &web, false, false, &progress{failures: 1, next: now.Add(time.Second)}, "later"},
	} {
		w := world{pods: map[string]Known{}, sandboxes: map[string]cri.Sandbox{}, synced: !c.away}
		if c.pod != nil {
			w.pods["u"] = *c.pod
		}
		if c.sandbox != nil {
			w.sandboxes["u"] = *c.sandbox
		}
		if c.meshed {
			w.meshed = []string{"u"}
		}
		known := map[string]*progress{}
		if c.known != nil {
			known["u"] = c.known
		}
		steps, next := plan(w, known, now)
		got := verb("")
		if len(steps) == 1 && steps[0].uid == "u" {
			got = steps[0].verb
		} else if !next.IsZero() {
			got = "later"
		}
		if got != c.want || len(steps) > 1 {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestBackoff(t *testing.T) {
	p, now := &progress{}, time.Now()
	var waits []string
	for range 10 {
		p.failed(errors.New("no"), now)
		waits = append(waits, p.next.Sub(now).String())
	}
	if got := strings.Join(waits, " "); got != "250ms 500ms 1s 2s 4s 8s 16s 30s 30s 30s" {
		t.Error(got)
	}
	p.failed(&assay.Error{Kind: assay.Unavailable, Err: errors.New("control is away")}, now)
	if wait := p.next.Sub(now); wait != retrySoon {
		t.Errorf("what passes by itself is tried again after %s", wait)
	}
	if p.failures != 11 || p.since != now {
		t.Errorf("%+v", p)
	}
}

// node is a host and a runtime of which a test says what they do.
type node struct {
	mu     sync.Mutex
	list   []cri.Sandbox
	meshed map[string]bool
	said   []string
	wake   func()
	away   error           // why the runtime cannot be asked
	tried  map[string]bool // pods called bad: the first attempt fails at once, others take for ever
}

func (n *node) Sandboxes(context.Context) ([]cri.Sandbox, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.list), n.away
}

func (n *node) Events(ctx context.Context, wake func()) error {
	n.mu.Lock()
	n.wake = wake
	n.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (n *node) Meshed() (list []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for uid := range n.meshed {
		list = append(list, uid)
	}
	return list
}

func (n *node) Leave(step string) {
	if step != "" {
		n.say(nil, "leave", step)
	}
}

func (n *node) Mesh(ctx context.Context, p Placed) error {
	if strings.HasPrefix(p.UID, "bad") {
		n.mu.Lock()
		again := n.tried[p.UID]
		n.tried[p.UID] = true
		n.mu.Unlock()
		if again {
			<-ctx.Done()
		}
		return errors.New("its kernel has no nftables")
	}
	n.say(func() { n.meshed[p.UID] = true }, "mesh", p.UID)
	return nil
}

func (n *node) Release(uid string) error {
	n.say(func() { delete(n.meshed, uid) }, "release", uid)
	return nil
}

func (n *node) Attest(uid string, set assay.ArtifactSet) error {
	n.say(nil, "attest", uid, len(set))
	return nil
}

func (n *node) End(_ context.Context, uid string) error {
	n.say(func() { delete(n.meshed, uid) }, "end", uid)
	return nil
}

func (n *node) say(change func(), what ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if change != nil {
		change()
	}
	n.said = append(n.said, fmt.Sprintln(what...))
}

func (n *node) change(do func()) {
	n.mu.Lock()
	do()
	wake := n.wake
	n.mu.Unlock()
	if wake != nil {
		wake()
	}
}

func (n *node) has(what string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.said, what+"\n")
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come to be: %s", what)
		}
	}
}

// TestReconciler: forty pods are meshed, attested and released while others, as many as
// there are workers, do not answer.
func TestReconciler(t *testing.T) {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	source := &Source{cfg: Config{System: DefaultSystem, Log: quiet}, pods: map[string]*Pod{}, names: map[string]string{}, namespaces: map[string]map[string]string{"bank": {MeshLabel: Enabled}}, changed: make(chan struct{}, 1)}
	pods := &kind{s: source, clear: source.clearPods, set: source.setPod, remove: source.removePod}
	n := &node{meshed: map[string]bool{}, tried: map[string]bool{}}
	var objects []any
	add := func(uid string) {
		objects = append(objects, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: types.UID(uid), Namespace: "bank", Name: uid}})
		s := sandbox("s-"+uid, "web")
		s.UID, s.Namespace, s.Name = uid, "bank", uid
		n.list = append(n.list, s)
	}
	for i := range workers {
		add(fmt.Sprintf("bad-%d", i))
	}
	for i := range 40 {
		add(fmt.Sprintf("good-%d", i))
	}
	source.synced = [2]bool{true, true}
	pods.Replace(objects, "")
	r := NewReconciler(source, n, n, quiet)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	eventually(t, "the bad ones are named", func() bool { return len(r.Unmeshed()) == workers })
	for i := range 40 {
		uid := fmt.Sprintf("good-%d", i)
		eventually(t, uid+" is meshed and attested", func() bool { return n.has("mesh "+uid) && n.has("attest "+uid+" 1") })
	}
	if u := r.Unmeshed()[0]; u.Reason != Failed || u.Name != "bad-0" || u.Err.Error() != "its kernel has no nftables" || u.Attempts == 0 || u.Since.IsZero() {
		t.Errorf("%+v", u)
	}

	// Another container; a label; the end of a pod.
	n.change(func() {
		i := slices.IndexFunc(n.list, func(s cri.Sandbox) bool { return s.UID == "good-1" })
		n.list[i].Containers = append(sandbox("", "debug").Containers, n.list[i].Containers...)
	})
	eventually(t, "the larger set is attested", func() bool { return n.has("attest good-1 2") })
	pods.Update(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "good-2", Namespace: "bank", Name: "good-2", Labels: map[string]string{MeshLabel: Disabled}}})
	eventually(t, "one is released", func() bool { return n.has("release good-2") })
	n.change(func() {
		n.list = slices.DeleteFunc(n.list, func(s cri.Sandbox) bool { return s.UID == "good-3" })
	})
	pods.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "good-3", Namespace: "bank", Name: "good-3"}})
	eventually(t, "one has ended", func() bool { return n.has("end good-3") })

	// The mesh is taken out.
	namespaces := &kind{s: source, index: 1, set: source.setNamespace, remove: source.removeNamespace}
	for _, step := range []string{LeavingServe, LeavingDial, LeavingRelease} {
		if n.has("release good-4") {
			t.Errorf("a pod was released before step %s", step)
		}
		namespaces.Update(&metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: DefaultSystem, Labels: map[string]string{LeavingLabel: step}}})
		eventually(t, "the agent hears of step "+step, func() bool { return n.has("leave " + step) })
	}
	for i := 4; i < 40; i++ {
		uid := fmt.Sprintf("good-%d", i)
		eventually(t, uid+" is released", func() bool { return n.has("release " + uid) })
	}
	if _, wanted, err := source.Pod(ctx, "bank", "good-4", "good-4"); wanted || err != nil {
		t.Errorf("a pod that starts is wanted: %v, %v", wanted, err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestUnmeshed: whoever is labelled and not in the mesh is named, whatever keeps it out, and
// until somebody says that it is meant to be.
func TestUnmeshed(t *testing.T) {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	source := &Source{cfg: Config{System: DefaultSystem, Log: quiet}, pods: map[string]*Pod{}, names: map[string]string{}, namespaces: map[string]map[string]string{"bank": {MeshLabel: Enabled}}, changed: make(chan struct{}, 1)}
	source.synced = [2]bool{true, true}
	pods := &kind{s: source, clear: source.clearPods, set: source.setPod, remove: source.removePod}
	object := func(name string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: types.UID(name), Namespace: "bank", Name: name}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
		if change != nil {
			change(p)
		}
		return p
	}
	hostNetwork := func(p *corev1.Pod) { p.Spec.HostNetwork = true }
	pods.Replace([]any{
		object("host", hostNetwork),
		object("static", func(p *corev1.Pod) { p.Annotations = map[string]string{mirrored: "5e8a"} }),
		object("ended", func(p *corev1.Pod) { p.Spec.HostNetwork, p.Status.Phase = true, corev1.PodSucceeded }),
		object("starts", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }),
		object("elsewhere", func(p *corev1.Pod) { p.Spec.HostNetwork, p.Namespace = true, "shop" }),
		object("ours", func(p *corev1.Pod) {
			p.Spec.HostNetwork, p.Namespace, p.Labels = true, DefaultSystem, map[string]string{MeshLabel: Enabled}
		}),
		object("web", nil), object("db", nil),
	}, "")
	n := &node{meshed: map[string]bool{"db": true}, tried: map[string]bool{}, away: errors.New("connection refused")}
	r := NewReconciler(source, n, n, quiet)
	listed := func() (names string) {
		for _, u := range r.Unmeshed() {
			names += fmt.Sprint(u.Name, " ", u.Reason, "; ")
			e, ok := errors.AsType[*assay.Error](u.Err)
			if !ok || !strings.Contains(e.Op, "bank/"+u.Name) || e.Remedy == "" || u.Since.IsZero() != (u.Reason == HostNetwork || u.Reason == Static) {
				t.Errorf("%+v", u)
			}
		}
		return names
	}
	if got := listed(); got != "host host-network; static static; " {
		t.Errorf("listed at first: %s", got)
	}

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	eventually(t, "what the runtime would have to tell of is named", func() bool {
		return listed() == "host host-network; static static; web runtime; "
	})
	if u := r.Unmeshed(); !strings.Contains(u[2].Err.Error(), "connection refused") {
		t.Errorf("%v", u[2].Err)
	}
	web := sandbox("s-web", "web")
	web.UID, web.Namespace, web.Name = "web", "bank", "web"
	n.change(func() { n.list, n.away = []cri.Sandbox{web}, nil })
	eventually(t, "it is meshed", func() bool { return listed() == "host host-network; static static; " })

	pods.Update(object("host", func(p *corev1.Pod) { p.Spec.HostNetwork, p.Labels = true, map[string]string{MeshLabel: Disabled} }))
	if got := listed(); got != "static static; " {
		t.Errorf("listed when one is opted out: %s", got)
	}
	pods.Update(object("host", hostNetwork))
	namespaces := &kind{s: source, index: 1, set: source.setNamespace, remove: source.removeNamespace}
	namespaces.Update(&metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: DefaultSystem, Labels: map[string]string{LeavingLabel: LeavingRelease}}})
	if got := listed(); got != "" {
		t.Errorf("listed when the mesh is taken out: %s", got)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestAbsent: a pod that runs in a runtime that the agent does not ask is noticed, and since
// when.
func TestAbsent(t *testing.T) {
	runs := Known{Pod: Pod{running: true}, Wanted: true}
	w := world{
		meshed:    []string{"meshed"},
		pods:      map[string]Known{"lost": runs, "meshed": runs, "known": runs, "starts": {Wanted: true}, "unwanted": {Pod: Pod{running: true}}},
		sandboxes: map[string]cri.Sandbox{"known": {}},
	}
	began := time.Unix(1_700_000_000, 0)
	first := w.absent(nil, began)
	again := w.absent(first, began.Add(time.Hour))
	if len(first) != 1 || len(again) != 1 || !again["lost"].Equal(began) {
		t.Errorf("%v, then %v", first, again)
	}
	w.sandboxes["lost"] = cri.Sandbox{}
	if now := w.absent(again, began.Add(time.Hour)); len(now) != 0 {
		t.Errorf("the runtime knows it: %v", now)
	}
}
