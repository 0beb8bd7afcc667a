package control

import (
	"context"
	"fmt"
	"time"

	"assay.dev"
)

// What was found about workloads, for a platform that shows it at its pods.

// Found is a finding about a workload.
type Found struct {
	assay.Finding           // Time is the last
	First         time.Time //
	Count         int
}

// Found returns the findings of the last hour about workloads, and a number; with that number
// as after, it returns none until there is another one.
func (c *Control) Found(after uint64) ([]Found, uint64) {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.found == after {
		return nil, after
	}
	list, now := []Found{}, m.now()
	for _, f := range m.findings {
		if f.Workload != "" && now.Sub(f.Time) < time.Hour {
			list = append(list, Found{f.Finding, f.First, int(f.Count)})
		}
	}
	for _, s := range m.strays {
		if now.Sub(s.Time) < time.Hour {
			list = append(list, s.Found)
		}
	}
	return list, m.found
}

// stray is a finding that nobody reports. It follows from what a workload's host counts: traffic that
// passes beside its proxy and is no exception of a kind that there may be. Or from there being none: a
// pod that is to have a sidecar, or an agent, and has not.
type stray struct {
	Found
	amount uint64 // that it speaks of; it is found again when this is another one
}

// strayStays is how often one that stays as it is, is found again.
const strayStays = 30 * time.Minute

// strayEvery is how often counts are read for that: of 5,000 workloads it takes a fifth of a second.
const strayEvery = time.Minute

// lookForStrays does so until ctx ends.
func (c *Control) lookForStrays(ctx context.Context) error {
	t := time.NewTicker(strayEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			c.model.findStrays()
		}
	}
}

func (m *model) findStrays() {
	now := m.now()
	strays, unmetered := map[string]stray{}, map[string]time.Time{}
	for r := range m.counts {
		if !r.gone.IsZero() {
			continue
		}
		if r.Balance == nil {
			unmetered[r.workload.ID] = now
		}
		for _, s := range []stray{unexplained(r), escaped(r, now)} {
			if s.amount > 0 {
				s.First, s.Count = s.Time, 1
				strays[s.Workload+" "+s.Kind] = s
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.checkSidecars() {
		f.Time = now
		strays[f.Workload+" "+f.Kind] = stray{Found{f, now, 1}, uint64(now.Truncate(strayStays).Unix())}
	}
	for key, s := range strays {
		old, known := m.strays[key]
		if known && old.amount == s.amount {
			strays[key] = old
			continue
		}
		if known {
			s.First, s.Count = old.First, old.Count+1
			strays[key] = s
		}
		m.found++
	}
	m.strays = strays
	for id := range unmetered {
		if since, known := m.unmetered[id]; known {
			unmetered[id] = since
		}
	}
	m.unmetered = unmetered
}

// checkMetered is about workloads whose hosts tell of them, look after look, and never where the bytes
// on their links belong. mu is held.
func (m *model) checkMetered() (out []assay.Finding) {
	for id, since := range m.unmetered {
		if w, ok := m.catalog.Workload(id); ok && m.now().Sub(since) >= settleIn {
			out = append(out, assay.Finding{Time: since, Workload: id, Kind: notMetered, Subject: w.Namespace + "/" + w.Name,
				Detail: "its host does not tell where the bytes on its link belong: what passes beside its proxy is not known", Remedy: "see what the host's agent says, and that it is of control's version"})
		}
	}
	return out
}

// unexplained is about bytes on a workload's link that belong nowhere.
func unexplained(r *counts) (s stray) {
	for _, f := range checkBalance(r) {
		if f.Kind == unexplainedBytes {
			b := r.Balance
			s.Finding = f
			s.amount = uint64(max(b.In.Unexplained, 0)+max(b.Out.Unexplained, 0)) + b.In.Control["stray"].Bytes + b.Out.Control["stray"].Bytes
		}
	}
	return s
}

// escaped is about TCP of a workload that avoids its capture.
func escaped(r *counts, now time.Time) (s stray) {
	others, bytes := 0, uint64(0)
	for i := range r.Signals {
		g := &r.Signals[i]
		if g.Reason != assay.ReasonEscaped || now.Sub(g.LastSeen) >= time.Hour {
			continue
		}
		others++
		s.amount += g.PacketsIn + g.PacketsOut
		bytes += g.BytesIn + g.BytesOut
		if s.Subject == "" || g.LastSeen.After(s.Time) {
			s.Time, s.Subject = g.LastSeen, fmt.Sprintf("%s:%d", end(assay.Party{Identity: g.Peer}, g.Remote), g.Port)
		}
	}
	s.Workload, s.Kind, s.Remedy = r.workload.ID, captureEscaped, remedyEscaped
	s.Detail = fmt.Sprintf("%d packets, %d bytes of TCP, with %d others (%s, the last), that neither the proxy sent nor the capture led to it", s.amount, bytes, others, s.Subject)
	return s
}
