package control

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// Bounds of what waits for a store that is away. Workloads, hosts and numbers need
// none: only the newest of each waits.
const (
	waitingCertificates = 100_000
	waitingFindings     = 5_000
	waitingAudit        = 10_000
)

const (
	metaEpoch = "control/epoch"
	metaIdle  = "control/idle-services"
)

// behind is what is written to the store after the fact. Its methods never block;
// run writes, in order, until its context ends.
type behind struct {
	store *store.DB
	log   *slog.Logger
	woken chan struct{}
	back  chan struct{} // capacity 1: the store may be back

	writing  sync.Mutex // held while something is written; before mu
	mu       sync.Mutex
	work     pending
	down     time.Time // since when the store takes nothing; zero: it does
	cause    error
	dropped  int // certificates, findings and audit lines that found no room
	numbered func(key string, n int64)
	released func(key string) bool
	services int64

	// Of one of several controls.
	several  bool
	attached func(host string, found bool)
	rejected func([]store.Rejected)
}

// pending is what waits.
type pending struct {
	workloads    map[string]said
	hosts        map[string]attached
	claims       map[string]string // by pod; "": it is none any more
	vips         map[string]bool   // key -> wanted or to be released
	idle         map[string]idleService
	certificates []store.Certificate
	findings     []assay.Finding
	audit        []store.Audit
}

// said is what a host says of a workload.
type said struct {
	w    *assay.Workload // nil: it has gone
	host string          // whose word it is; "": the platform's
}

// attached is a host whose stream came here, or went.
type attached struct {
	store.Host
	here bool
}

func newBehind(db *store.DB, log *slog.Logger) *behind {
	return &behind{store: db, log: log, woken: make(chan struct{}, 1), back: make(chan struct{}, 1), work: emptyPending()}
}

func emptyPending() pending {
	return pending{workloads: map[string]said{}, hosts: map[string]attached{}, vips: map[string]bool{}, claims: map[string]string{}}
}

func (p *pending) empty() bool {
	return len(p.workloads)+len(p.hosts)+len(p.vips)+len(p.claims)+len(p.certificates)+len(p.findings)+len(p.audit) == 0 && p.idle == nil
}

func (b *behind) add(f func(p *pending)) {
	b.mu.Lock()
	f(&b.work)
	b.mu.Unlock()
	select {
	case b.woken <- struct{}{}:
	default:
	}
}

func (b *behind) workload(id string, w *assay.Workload) {
	b.add(func(p *pending) { p.workloads[id] = said{w, w.Host} })
}

// gone has a workload forgotten that its host ("": the platform) says has gone.
func (b *behind) gone(id, host string) {
	b.add(func(p *pending) { p.workloads[id] = said{nil, host} })
}

// waits reports whether something is still to be stored of a workload.
func (b *behind) waits(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, waits := b.work.workloads[id]
	return waits
}

func (b *behind) host(h store.Host, here bool) {
	b.add(func(p *pending) { p.hosts[h.ID] = attached{h, here} })
}
func (b *behind) claim(pod, host string)           { b.add(func(p *pending) { p.claims[pod] = host }) }
func (b *behind) vip(key string, want bool)        { b.add(func(p *pending) { p.vips[key] = want }) }
func (b *behind) idle(list map[string]idleService) { b.add(func(p *pending) { p.idle = list }) }

// alone runs f while nothing else is written, after dropping what waits about a
// host: so that a host that is being removed is not stored again.
func (b *behind) alone(host string, f func() error) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	b.mu.Lock()
	delete(b.work.hosts, host)
	for id, w := range b.work.workloads {
		if w.host == host {
			delete(b.work.workloads, id)
		}
	}
	b.mu.Unlock()
	return f()
}

func (b *behind) certificate(c store.Certificate) {
	b.add(func(p *pending) { p.certificates = bounded(b, append(p.certificates, c), waitingCertificates) })
}
func (b *behind) finding(f assay.Finding) {
	b.add(func(p *pending) { p.findings = bounded(b, append(p.findings, f), waitingFindings) })
}
func (b *behind) audit(a store.Audit) {
	b.add(func(p *pending) { p.audit = bounded(b, append(p.audit, a), waitingAudit) })
}

// bounded drops the oldest that are over the bound.
func bounded[T any](b *behind, list []T, bound int) []T {
	if over := len(list) - bound; over > 0 {
		b.dropped += over
		return slices.Delete(list, 0, over)
	}
	return list
}

// auditID makes the key of an audit line, so that writing it twice stores it once.
// Keys sort by time.
func auditID(t time.Time) string {
	var r [8]byte
	rand.Read(r[:]) // never fails (crypto/rand)
	return fmt.Sprintf("%016x%s", uint64(t.UnixMicro()), hex.EncodeToString(r[:]))
}

// health says since when and why the store takes nothing, and how much was lost.
func (b *behind) health() (down time.Time, dropped int, cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.down, b.dropped, b.cause
}

// flushTime bounds one attempt. What was written by then stays written.
const flushTime = 5 * time.Second

const (
	retryLeast = 200 * time.Millisecond
	retryMost  = 10 * time.Second
)

// again has run try at once what it tries again later: the store is back.
func (b *behind) again() {
	select {
	case b.back <- struct{}{}:
	default:
	}
}

// run writes what waits until ctx ends, then once more what is left.
func (b *behind) run(ctx context.Context) error {
	wait := retryLeast
	for {
		select {
		case <-ctx.Done():
			if err := b.flush(context.WithoutCancel(ctx)); err != nil {
				b.log.Error("not everything is stored; hosts will report it again", "err", err)
			}
			return nil
		case <-b.woken:
		}
		for {
			if err := b.flush(ctx); err == nil {
				wait = retryLeast
				break
			}
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-t.C:
			case <-b.back:
			}
			t.Stop()
			if ctx.Err() != nil {
				break
			}
			wait = min(2*wait, retryMost)
		}
	}
}

// flush writes everything that waits. What the store does not take now is kept,
// beneath what came in meanwhile; what it never will is dropped and logged.
func (b *behind) flush(ctx context.Context) error {
	b.writing.Lock()
	defer b.writing.Unlock()
	b.mu.Lock()
	work := b.work
	b.work = emptyPending()
	b.mu.Unlock()
	if work.empty() {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	err := b.write(limited, &work)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		if !b.down.IsZero() {
			b.log.Info("the store is back", "away", time.Since(b.down).Round(time.Millisecond))
		}
		b.down, b.cause = time.Time{}, nil
		return nil
	}
	if b.down.IsZero() && ctx.Err() == nil {
		b.down = time.Now()
		b.log.Warn("the store is away; what it should hold waits in memory", "err", err)
	}
	b.cause = err
	b.keep(&work)
	return err
}

// keep puts back what was not written.
func (b *behind) keep(old *pending) {
	p := &b.work
	keepOld(p.workloads, old.workloads)
	keepOld(p.hosts, old.hosts)
	keepOld(p.vips, old.vips)
	keepOld(p.claims, old.claims)
	if p.idle == nil {
		p.idle = old.idle
	}
	p.certificates = bounded(b, append(old.certificates, p.certificates...), waitingCertificates)
	p.findings = bounded(b, append(old.findings, p.findings...), waitingFindings)
	p.audit = bounded(b, append(old.audit, p.audit...), waitingAudit)
}

func keepOld[V any](now, old map[string]V) {
	for k, v := range old {
		if _, newer := now[k]; !newer {
			now[k] = v
		}
	}
}

// write writes p and takes out of it what is written.
func (b *behind) write(ctx context.Context, p *pending) error {
	// Somebody waits for these. When there are none left, the rest is written all
	// the same.
	var short error
	for _, key := range slices.Sorted(maps.Keys(p.vips)) {
		if err := b.number(ctx, key, p.vips[key]); err != nil {
			short = err
			break
		}
		delete(p.vips, key)
	}
	for _, id := range slices.Sorted(maps.Keys(p.hosts)) {
		if err := b.final("store host", b.writeHost(ctx, p.hosts[id])); err != nil {
			return err
		}
		delete(p.hosts, id)
	}
	if err := b.writeWorkloads(ctx, p); err != nil {
		return err
	}
	if len(p.claims) > 0 {
		if err := b.final("store claims", b.store.SetClaims(ctx, p.claims)); err != nil {
			return err
		}
		clear(p.claims)
	}
	if p.idle != nil {
		raw, err := json.Marshal(p.idle)
		if err == nil {
			err = b.store.PutMeta(ctx, metaIdle, raw)
		}
		if err := b.final("store idle services", err); err != nil {
			return err
		}
		p.idle = nil
	}
	for len(p.certificates) > 0 {
		part := p.certificates[:min(page, len(p.certificates))]
		if err := b.final("store certificates", b.store.InsertCertificates(ctx, part...)); err != nil {
			return err
		}
		p.certificates = p.certificates[len(part):]
	}
	if err := each(b, &p.findings, "store finding", func(f assay.Finding) error { return b.store.AppendFinding(ctx, f) }); err != nil {
		return err
	}
	if err := each(b, &p.audit, "store audit line", func(a store.Audit) error { return b.store.AppendAudit(ctx, a) }); err != nil {
		return err
	}
	return short
}

func each[T any](b *behind, list *[]T, op string, write func(T) error) error {
	for len(*list) > 0 {
		if err := b.final(op, write((*list)[0])); err != nil {
			return err
		}
		*list = (*list)[1:]
	}
	return nil
}

// page is how many records of a kind are written at once: a cluster that joins has thousands.
const page = 500

func (b *behind) writeHost(ctx context.Context, h attached) error {
	switch {
	case !b.several:
		return b.store.PutHost(ctx, h.Host)
	case !h.here:
		return b.store.DetachHost(ctx, h.ID, h.Seen)
	}
	found, err := b.store.AttachHost(ctx, h.Host)
	if err == nil {
		b.attached(h.ID, found)
	}
	return err
}

func (b *behind) writeWorkloads(ctx context.Context, p *pending) error {
	var put []assay.Workload
	var gone []string
	for _, id := range slices.Sorted(maps.Keys(p.workloads)) {
		if w := p.workloads[id].w; w != nil {
			put = append(put, *w)
		} else {
			gone = append(gone, id)
		}
	}
	if b.several {
		return b.reportWorkloads(ctx, p, put, gone)
	}
	for part := range slices.Chunk(gone, page) {
		if err := b.final("forget workloads", b.store.DeleteWorkloads(ctx, part...)); err != nil {
			return err
		}
		for _, id := range part {
			delete(p.workloads, id)
		}
	}
	for part := range slices.Chunk(put, page) {
		if err := b.final("store workloads", b.store.PutWorkloads(ctx, part...)); err != nil {
			return err
		}
		for _, w := range part {
			delete(p.workloads, w.ID)
		}
	}
	return nil
}

// reportWorkloads stores what others may contradict.
func (b *behind) reportWorkloads(ctx context.Context, p *pending, put []assay.Workload, gone []string) error {
	for len(put)+len(gone) > 0 {
		var ended []store.Gone
		for _, id := range gone[:min(len(gone), page)] {
			ended = append(ended, store.Gone{ID: id, Host: p.workloads[id].host})
		}
		there := put[:min(len(put), page-len(ended))]
		rejected, err := b.store.ReportWorkloads(ctx, there, ended)
		if err := b.final("store workloads", err); err != nil {
			return err
		}
		for _, g := range ended {
			delete(p.workloads, g.ID)
		}
		for i := range there {
			delete(p.workloads, there[i].ID)
		}
		gone, put = gone[len(ended):], put[len(there):]
		if len(rejected) > 0 {
			b.rejected(rejected)
		}
	}
	return nil
}

// number allocates or releases the number of a service's virtual address.
func (b *behind) number(ctx context.Context, key string, want bool) error {
	if !want {
		if !b.released(key) {
			return nil
		}
		return b.final("release an address", b.store.ReleaseVIP(ctx, key))
	}
	n, err := b.store.AllocateVIP(ctx, key, b.services)
	if err != nil {
		return b.final("allocate an address", err)
	}
	b.numbered(key, n)
	return nil
}

// final passes on errors after which trying again makes sense, and logs others.
func (b *behind) final(op string, err error) error {
	if err == nil || assay.KindOf(err) == assay.Unavailable || assay.KindOf(err) == assay.Internal {
		return err
	}
	b.log.Error("the store refuses for good", "op", op, "err", err)
	return nil
}
