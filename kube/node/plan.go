package node

import (
	"maps"
	"reflect"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/kube/cri"
)

// What can be done for a pod.
type verb string

const (
	meshIt    verb = "mesh"
	attestIt  verb = "attest"
	releaseIt verb = "release"
	endIt     verb = "end"
)

// step is what is to be done for one pod.
type step struct {
	verb    verb
	uid     string
	pod     Pod // meshIt, releaseIt
	sandbox cri.Sandbox
}

// world is what is, as far as it could be asked.
type world struct {
	meshed    []string // UIDs; asked before the pods
	pods      map[string]Known
	synced    bool // pods are all that there are
	sandboxes map[string]cri.Sandbox
}

// progress is what a Reconciler remembers of a pod.
type progress struct {
	sandbox  string // that was meshed
	attested assay.ArtifactSet
	released bool
	busy     bool
	failures int
	since    time.Time // of the first failure
	next     time.Time // not before
	err      error
}

const (
	retryFirst = 250 * time.Millisecond
	retryMost  = 30 * time.Second
	retrySoon  = 2 * time.Second // at most, for what passes by itself: control is away, the node has not joined
)

// failed counts a failure and says when to try again.
func (p *progress) failed(err error, now time.Time) {
	if p.failures == 0 {
		p.since = now
	}
	most := retryMost
	if assay.KindOf(err) == assay.Unavailable {
		most = retrySoon
	}
	p.next = now.Add(min(retryFirst<<min(p.failures, 10), most))
	p.failures++
	p.err = err
}

// plan says what is to be done now, by UID, and when to look again at the latest; zero
// when nothing waits for its time.
func plan(w world, known map[string]*progress, now time.Time) (steps []step, next time.Time) {
	meshed := map[string]bool{}
	for _, uid := range w.meshed {
		meshed[uid] = true
	}
	all := maps.Clone(meshed)
	for uid := range w.sandboxes {
		all[uid] = true
	}
	for _, uid := range slices.Sorted(maps.Keys(all)) {
		p := known[uid]
		if p == nil {
			p = &progress{}
		}
		s, ok := w.step(uid, meshed[uid], p)
		switch {
		case !ok || p.busy:
		case now.Before(p.next):
			if next.IsZero() || p.next.Before(next) {
				next = p.next
			}
		default:
			steps = append(steps, s)
		}
	}
	return steps, next
}

// absent are the pods that are wanted and run, as the API server has heard, and that neither
// the runtime knows nor the host: since when, as far as was known before.
func (w *world) absent(before map[string]time.Time, now time.Time) map[string]time.Time {
	out := map[string]time.Time{}
	for uid, p := range w.pods {
		if _, runs := w.sandboxes[uid]; !runs && p.Wanted && p.running && !slices.Contains(w.meshed, uid) {
			out[uid] = now
			if since, known := before[uid]; known {
				out[uid] = since
			}
		}
	}
	return out
}

// step says what a pod lacks.
func (w *world) step(uid string, meshed bool, p *progress) (step, bool) {
	sandbox, runs := w.sandboxes[uid]
	pod, there := w.pods[uid]
	s := step{uid: uid, pod: pod.Pod, sandbox: sandbox}
	switch set := sandbox.Artifacts(); {
	case !runs:
		// Its sandbox is being made, unless nobody knows the pod any more.
		s.verb = endIt
		return s, w.synced && (!there || pod.Ended)
	case there && w.synced && pod.Wanted && (!meshed || p.sandbox != sandbox.ID):
		s.verb = meshIt
		return s, true
	case there && w.synced && !pod.Wanted && !pod.Ended && meshed:
		s.verb = releaseIt
		return s, !p.released
	default: // also while the API server is away: what runs has changed all the same
		s.verb = attestIt
		return s, meshed && len(set) > 0 && !reflect.DeepEqual(set, p.attested)
	}
}
