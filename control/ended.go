package control

import (
	"context"
	"time"

	"assay.dev/store"
)

// DefaultKeepEnded is how long the inventory keeps certificates that have ended: a quarter of a
// year, the part of an audit history that has to be at hand at once (PCI DSS 10.5.1). It
// answers which identity, artifacts, host and issuer were behind a serial number. Who was given an
// operator's certificate, and who took which back, is in the audit trail, and stays.
const DefaultKeepEnded = 90 * 24 * time.Hour

// leastKeepEnded is more than the clocks of several controls differ: what has ended for one still
// lives for another.
const leastKeepEnded = time.Hour

const (
	forgetEvery = time.Hour
	// forgetPause leaves the store to others between two batches, each of which has SQLite's one
	// writer for 16 ms with a million lines in the inventory. No mesh is given 250 a second.
	forgetPause = time.Second
)

// forgetEnded forgets the certificates that ended long ago, until ctx ends. Of several controls
// one does; two that do it at once are in each other's way for one batch.
func (c *Control) forgetEnded(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if !c.several.first(c.cfg.takeover) {
			t.Reset(c.cfg.takeover) // it may be by then
			continue
		}
		wait := forgetEvery
		n, err := c.store.PruneCertificates(ctx, c.now().Add(-c.cfg.KeepEnded))
		switch {
		case err != nil && ctx.Err() == nil:
			c.log.Warn("certificates that ended long ago are not forgotten; this is tried again", "in", wait, "err", err)
		case n == store.PruneBatch:
			wait = forgetPause
		}
		t.Reset(wait)
	}
}
