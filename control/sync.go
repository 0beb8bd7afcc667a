package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/grpc"
)

// coalesce is the least time between two deltas on one stream: what changes in
// between travels together.
const coalesce = 50 * time.Millisecond

// hold is how long the first delta of a stream waits for the host to say what it runs:
// what a host hears first is then no older than what it said itself. A host that was
// ended with all its workloads would else hear of them as if they lived.
const hold = 3 * time.Second

var (
	errReplaced = errors.New("the host opened another stream")
	errExpired  = errors.New("the host's certificate has expired")
	errTooSlow  = errors.New("the stream fell too far behind; open it again")
)

// session is one host's stream. It is a cursor into the snapshot and a few flags:
// nothing is queued for it.
type session struct {
	host    string
	expires time.Time // a stream ends with the certificate that opened it; zero: never
	cancel  context.CancelCauseFunc
	woken   chan struct{} // capacity 1
	version uint64        // of the snapshot that was handed to the stream
	// The rest is what the stream has not been told. The model's lock guards it.
	first    *resumption // nil: sent
	bundle   uint64      // version that was sent
	taps     uint64      // version of the taps that was sent
	accepted map[string]bool
	refused  map[string]*api.Refused
	seen     map[string]bool // workloads that were reported on this stream
	released map[string]bool // those that are about to go, and run on
	// early are acknowledgements of proxies whose workload is yet to be reported;
	// at most maxRunning.
	early    map[string]uint64
	attached bool // the store knows that the stream is here; if others share it
	synced   bool // the host has told all that it runs
}

// resumption is what a host had when it opened its stream, for the first delta.
type resumption struct {
	epoch uint64
	known map[string]uint64
	by    time.Time // the delta waits no longer than this for Synced; zero: it came
	// The host heard from another control of what this one has to hear of first: revision
	// until, and, for the hosts that come with it, what they report.
	revision  int64
	until     time.Time
	elsewhere bool
}

// heardMost is how long a host that comes from another control waits for this one to have
// heard what that one knew. Until then it goes on with that.
const heardMost = 10 * time.Second

func (s *session) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// Sync is one host's stream. This goroutine sends; receive, which ends with the
// stream, takes what comes.
func (c *Control) Sync(stream grpc.BidiStreamingServer[api.HostUpdate, api.ControlUpdate]) error {
	who := callerOf(stream.Context())
	msg, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := msg.GetHello()
	if hello == nil {
		return &assay.Error{Kind: assay.Invalid, Op: "sync host " + who.name, Err: errors.New("the first message is not a hello")}
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	s := &session{host: who.name, expires: who.expires, cancel: cancel, woken: make(chan struct{}, 1),
		accepted: map[string]bool{}, refused: map[string]*api.Refused{}, seen: map[string]bool{}, released: map[string]bool{}, early: map[string]uint64{}}
	welcome, err := c.model.join(s, hello)
	if err != nil {
		return err
	}
	defer c.model.leave(s)
	c.log.Info("host connected", "host", s.host, "build", hello.GetBuild())
	if err := stream.Send(&api.ControlUpdate{Update: &api.ControlUpdate_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	c.streams.Go(func() { c.receive(s, stream) })
	err = c.send(ctx, s, stream)
	c.log.Info("host disconnected", "host", s.host, "cause", err)
	return err
}

// join makes s the stream of its host.
func (m *model) join(s *session, hello *api.HostHello) (*api.Welcome, error) {
	name, err := api.HostName(hello.GetHostName())
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sync host " + s.host, Err: err}
	}
	advertise, err := api.Advertise(hello.GetAdvertise())
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sync host " + s.host, Err: fmt.Errorf("advertised %w", err)}
	}
	advertise6, err := api.Advertise(hello.GetAdvertise6())
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sync host " + s.host, Err: fmt.Errorf("advertised %w", err)}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[s.host]
	if h == nil {
		return nil, unknownHost(s.host)
	}
	if m.cluster != nil && !m.cluster.told {
		// Without services and pods, a snapshot would tell proxies that there are none.
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "sync host " + s.host, Err: errors.New("the API server has not told control yet what there is"), Remedy: "go on with what is known; see that control reaches the API server"}
	}
	m.stopWaiting(s.host)
	if h.session != nil {
		h.session.cancel(errReplaced)
		delete(m.sessions, h.session)
	}
	h.session, h.present, h.Ready, h.Seen = s, true, true, m.now()
	if name != "" && h.Node == "" {
		h.Name = name
	}
	h.Advertise, h.Advertise6 = advertise, advertise6
	if h.lost {
		h.lost = false
		m.catalog.SetHostLost(h.ID, false)
	}
	m.behind.host(h.Host, true)
	m.publishHost(h)
	s.first = &resumption{epoch: hello.GetEpoch(), known: hello.GetKnown(), by: time.Now().Add(m.hold)}
	if m.me != "" && hello.GetEpoch() != 0 && hello.GetEpoch() != m.snapshot.epoch {
		s.first.revision, s.first.until, s.first.elsewhere = hello.GetRevision(), time.Now().Add(heardMost), true
	}
	s.version = m.snapshot.version
	m.sessions[s] = true
	m.publish()
	return &api.Welcome{
		HostId: h.ID, TrustDomain: m.trustDomain, Prefixes: api.FromPrefixes(h.Prefixes),
		MeshPrefixes: api.FromPrefixes(m.network.prefixes()), Epoch: m.snapshot.epoch,
	}, nil
}

func unknownHost(id string) error {
	return &assay.Error{Kind: assay.Denied, Op: "host " + id, Err: errors.New("it is not of this mesh, or was removed"), Remedy: "join it again with a new token"}
}

// attached takes in that the store knows of a host's stream, or that the host was removed.
func (m *model) attached(id string, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[id]
	switch {
	case h == nil:
	case !found:
		m.removeHostLocked(id)
	case h.session != nil:
		h.session.attached, h.Replica = true, m.me
	}
}

// leave ends s; the host keeps its workloads.
func (m *model) leave(s *session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, s)
	h := m.hosts[s.host]
	if h == nil || h.session != s {
		return
	}
	m.stopWaiting(s.host)
	h.session, h.Seen = nil, m.now()
	if h.Replica == m.me {
		h.Replica = ""
	}
	m.settle(h)
	m.behind.host(h.Host, false)
	m.publish()
}

// send tells the host what it does not know yet, until the stream ends.
func (c *Control) send(ctx context.Context, s *session, stream grpc.BidiStreamingServer[api.HostUpdate, api.ControlUpdate]) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	var last time.Time
	s.wake()
	for {
		select {
		case <-ctx.Done():
			return ended(ctx, s.host)
		case <-s.woken:
		case <-timer.C:
		}
		due := time.Since(last) >= coalesce
		batch, err := c.model.collect(s, due)
		if err != nil {
			return err
		}
		for _, u := range batch.updates {
			if err := stream.Send(u); err != nil {
				return err
			}
		}
		if batch.changes != nil {
			last = time.Now()
			if err := sendDelta(stream, batch.changes); err != nil {
				return err
			}
		}
		if batch.more {
			timer.Reset(max(batch.hold, coalesce-time.Since(last), 0))
		}
	}
}

// ended says why a stream ends.
func ended(ctx context.Context, host string) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, context.Canceled) {
		return cause
	}
	return &assay.Error{Kind: assay.Unavailable, Op: "sync host " + host, Err: cause, Remedy: "open the stream again"}
}

// batch is what a stream sends next.
type batch struct {
	updates []*api.ControlUpdate
	changes *changes
	more    bool          // a delta exists, but it is too early for it
	hold    time.Duration // for how long at most, if not for coalescing
}

// collect takes what s has not been told. Without due it leaves the delta.
func (m *model) collect(s *session, due bool) (b batch, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bundle != nil && s.bundle != m.bundle.Version {
		s.bundle = m.bundle.Version
		b.updates = append(b.updates, &api.ControlUpdate{Update: &api.ControlUpdate_Bundle{Bundle: m.bundle}})
	}
	if s.taps != m.taps.version {
		s.taps = m.taps.version
		b.updates = append(b.updates, &api.ControlUpdate{Update: &api.ControlUpdate_Watches{Watches: m.taps.message()}})
	}
	for _, id := range slices.Sorted(maps.Keys(s.accepted)) {
		b.updates = append(b.updates, &api.ControlUpdate{Update: &api.ControlUpdate_Accepted{Accepted: &api.Accepted{WorkloadId: id}}})
	}
	for _, id := range slices.Sorted(maps.Keys(s.refused)) {
		b.updates = append(b.updates, &api.ControlUpdate{Update: &api.ControlUpdate_Refused{Refused: s.refused[id]}})
	}
	clear(s.accepted)
	clear(s.refused)
	if s.first != nil {
		if left := time.Until(s.first.by); left > 0 && !s.first.by.IsZero() {
			b.more, b.hold = true, left
			return b, nil
		}
		if s.first.revision > m.revision && time.Now().Before(s.first.until) {
			b.more, b.hold = true, coalesce
			return b, nil
		}
		first := m.snapshot.resume(s.first.epoch, s.first.known)
		first.revision = m.revision
		b.changes, s.first, s.version = &first, nil, first.version
		return b, nil
	}
	if s.version == m.snapshot.version {
		return b, nil
	}
	if !due {
		b.more = true
		return b, nil
	}
	ch, ok := m.snapshot.since(s.version)
	if !ok {
		return b, &assay.Error{Kind: assay.Unavailable, Op: "sync host " + s.host, Err: errTooSlow}
	}
	s.version, ch.revision = ch.version, m.revision
	b.changes = &ch
	return b, nil
}

// receive takes what the host reports until the stream ends.
func (c *Control) receive(s *session, stream grpc.BidiStreamingServer[api.HostUpdate, api.ControlUpdate]) {
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errors.New("the host closed its stream")
		}
		if r := msg.GetRecords(); err == nil && r != nil {
			c.model.seen(s, r)
		} else if err == nil {
			err = c.model.take(s, msg)
		}
		if err != nil {
			s.cancel(err)
			return
		}
	}
}

// has reports whether a host has a workload in its hands, taken or not.
func (m *model) has(s *session, id string) bool {
	w, ok := m.catalog.Workload(id)
	return ok && w.Host == s.host || m.cluster != nil && m.cluster.claims[id].host == s.host
}

// take applies one update. An error ends the stream: the host speaks another
// language, or this stream is not its newest any more. What is wrong about one
// workload is answered and recorded instead.
func (m *model) take(s *session, msg *api.HostUpdate) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[s.host]
	if h == nil || h.session != s {
		return errReplaced
	}
	switch u := msg.GetUpdate().(type) {
	case *api.HostUpdate_WorkloadUp:
		if w, err := u.WorkloadUp.Noun(); err == nil {
			m.report(h, s, &w)
		} else {
			m.refuse(s, u.WorkloadUp.GetId(), &assay.Error{Kind: assay.Invalid, Op: "take workload", Err: err})
		}
	case *api.HostUpdate_WorkloadReleased:
		if m.has(s, u.WorkloadReleased) {
			s.released[u.WorkloadReleased] = true
		}
	case *api.HostUpdate_WorkloadGone:
		id := u.WorkloadGone
		ended := m.has(s, id) && !s.released[id]
		delete(s.released, id)
		m.waitNoMore(s, id)
		m.publishSoon()
		if w, ok := m.catalog.Workload(id); ok && w.Host == s.host {
			m.removeWorkload(id)
			m.behind.gone(id, s.host)
		}
		if ended { // the platform may send clients there for a while
			m.claim(h, s, id)
		}
	case *api.HostUpdate_Synced:
		for _, id := range m.workloadsOf(s.host) {
			if !s.seen[id] {
				m.removeWorkload(id)
				m.behind.gone(id, s.host)
			}
		}
		s.synced = true
		m.disclaim(func(_ string, c claim) bool { return c.host == s.host && c.session != s })
		m.publish()
		// From another control hosts come together: what one of them said there last the others
		// know, and this control when that host has told it again.
		if s.first != nil && !s.first.elsewhere {
			s.first.by = time.Time{}
			s.wake()
		}
	case *api.HostUpdate_BundleAck:
		if id := u.BundleAck.GetWorkloadId(); id == "" {
			h.bundle = u.BundleAck.GetVersion()
		} else if w, ok := m.catalog.Workload(id); ok && w.Host == s.host {
			m.acks[id] = u.BundleAck.GetVersion()
		} else if !ok && api.ValidID(id) && (h.Pod == "" || h.Pod == id) && len(s.early) < maxRunning {
			s.early[id] = u.BundleAck.GetVersion()
		}
	case *api.HostUpdate_Report:
		id := api.ReportOf(u.Report)
		if id == "" {
			return &assay.Error{Kind: assay.Invalid, Op: "take report", Err: errors.New("it is of no workload")}
		}
		if w, ok := m.catalog.Workload(id); ok && w.Host == s.host {
			m.reports[id] = &report{encoded: u.Report, workload: w, received: m.now()}
		}
	case *api.HostUpdate_Finding:
		f, err := u.Finding.Noun()
		if err != nil {
			return &assay.Error{Kind: assay.Invalid, Op: "take finding", Err: err}
		}
		if f.Workload == "" || m.speaksFor(s.host, f.Workload) {
			m.findingOf(h, f)
		}
	case *api.HostUpdate_Hello:
		return &assay.Error{Kind: assay.Invalid, Op: "sync host " + s.host, Err: errors.New("a second hello")}
	}
	return nil // a kind of a newer host's is passed over
}

// speaksFor reports whether a workload is the host's, or a pod of its node that is none yet:
// of one that cannot be meshed nothing else is ever heard.
func (m *model) speaksFor(host, id string) bool {
	if w, ok := m.catalog.Workload(id); ok {
		return w.Host == host
	}
	h := m.hosts[host]
	if m.cluster == nil || h == nil || h.Node == "" {
		return false
	}
	p := m.cluster.pods[id]
	return p != nil && h.maySpeakFor(p)
}

// report takes what a host says of a workload, refuses it, or keeps it until the platform
// knows of it.
func (m *model) report(h *host, s *session, w *assay.Workload) {
	stale, err := m.admit(h, w, s.seen)
	if err != nil {
		m.claim(h, s, w.ID)
	}
	if _, early := errors.AsType[tooEarly](err); early {
		s.seen[w.ID] = true
		m.wait(s, w, err)
		return
	}
	if m.cluster != nil {
		delete(m.cluster.waiting, w.ID)
	}
	if err != nil {
		m.refuse(s, w.ID, err)
		return
	}
	for _, id := range stale {
		m.removeWorkload(id)
		m.behind.gone(id, h.ID)
	}
	if h.Node != "" {
		w = m.cluster.pods[w.ID].describe(h, w)
	}
	s.seen[w.ID] = true
	m.setWorkload(w)
	m.disclaimPod(w.ID)
	if v, ok := s.early[w.ID]; ok {
		m.acks[w.ID] = v
		delete(s.early, w.ID)
	}
	m.behind.workload(w.ID, w)
	s.accepted[w.ID] = true
	delete(s.refused, w.ID)
	m.publishSoon()
	s.wake()
}

// maxRefused bounds the refusals that wait for a stream; a host that does not
// read them has no use for more.
const maxRefused = 1000

func (m *model) refuse(s *session, id string, err error) {
	m.findingOf(m.hosts[s.host], assay.Finding{Kind: "workload-refused", Subject: cut(id, 128), Detail: cut(fmt.Sprintf("host %s: %v", s.host, err), 1000)})
	if len(s.refused) >= maxRefused {
		return
	}
	r := &api.Refused{WorkloadId: cut(id, 128), Reason: err.Error()}
	if e, ok := errors.AsType[*assay.Error](err); ok && e.Err != nil {
		r.Reason, r.Remedy = e.Err.Error(), e.Remedy
	}
	s.refused[r.WorkloadId] = r
	s.wake()
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
