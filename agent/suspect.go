package agent

import (
	"context"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/api"
	"assay.dev/link"
)

// A proxy reads what strangers send it, so it is the part of a host that falls first.
// What one says costs the agent, and through it control, no more than this, however
// much of it there is; and what control would refuse never leaves the host, because
// the stream is everybody's.
const (
	maxFromProxy = 16 << 20 // one body; the report of a full recorder has a quarter of it

	messageEvery, messageBurst = 5 * time.Millisecond, 400
	probeEvery, probeBurst     = time.Millisecond, 32
	requestEvery, requestBurst = 2 * time.Second, 20
	findingEvery, findingBurst = time.Second, 32
)

// pace lets a burst through, and after it one in each interval. It is safe for
// concurrent use.
type pace struct {
	every, burst time.Duration
	now          func() time.Time

	mu   sync.Mutex
	paid time.Time // until when what was let through has used up the intervals
}

func newPace(every time.Duration, burst int) *pace {
	return &pace{every: every, burst: time.Duration(burst) * every, now: time.Now}
}

// early returns by how much the next one is early; one that is not is counted.
func (p *pace) early() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	paid := p.paid
	if paid.Before(now) {
		paid = now
	}
	if d := paid.Add(p.every).Sub(now) - p.burst; d > 0 {
		return d
	}
	p.paid = paid.Add(p.every)
	return 0
}

func (p *pace) allow() bool { return p.early() == 0 }

// grant lets one more through: it is not the peer's doing.
func (p *pace) grant() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paid = p.paid.Add(-p.every)
}

// wait returns when it is the next one's time; false when ctx ended first.
func (p *pace) wait(ctx context.Context) bool {
	for {
		d := p.early()
		if d == 0 {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
		}
	}
}

// speech is how much a proxy may say. Strangers make it ask about probes: that uses up nothing of
// what it has to say besides, and what it says nothing of what it may ask, since answers
// that are late are none.
type speech struct{ messages, probes *pace }

func newSpeech() speech {
	return speech{newPace(messageEvery, messageBurst), newPace(probeEvery, probeBurst)}
}

func (s *speech) of(kind link.Kind) *pace {
	if kind == link.KindProbe {
		return s.probes
	}
	return s.messages
}

func (s *session) isAwaited(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting[id] != nil
}

// checkReport holds a report to what control takes, with room for the agent's own part.
func (w *workload) checkReport(r *link.Report) error {
	counters := withKernel(r.Counters, capture.Refused{NoProxy: 1, NoEndpoint: 1})
	_, err := api.FromReport(&api.Report{Workload: w.id, Started: r.Started, Signals: r.Signals, Counters: counters}).Noun()
	return err
}

// Bounds of a finding's texts; a proxy of ours stays far below.
const (
	maxSubject = 256
	maxDetail  = 2048
)

// checkFinding holds a finding to what control takes. Its proxy says what it saw; about
// whom and when is what the agent knows itself.
func (w *workload) checkFinding(f *assay.Finding) error {
	if now := time.Now(); f.Time.After(now) || now.Sub(f.Time) > 24*time.Hour {
		f.Time = now
	}
	f.Workload = w.id // a proxy speaks for itself only
	f.Subject, f.Detail, f.Remedy = cut(f.Subject, maxSubject), cut(f.Detail, maxDetail), cut(f.Remedy, maxDetail)
	_, err := api.FromFinding(f).Noun()
	return err
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
