package agent

import (
	"context"
	"reflect"

	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// What a proxy is told, in the order of package link.

// send brings the proxy up to date with each new view, until ctx ends.
func (s *session) send(ctx context.Context) error {
	if s.knows {
		select { // what it knows is at least as new as what this agent read
		case <-s.w.a.fresh.ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	full := true
	for {
		if err := s.update(s.w.a.view.Load(), full); err != nil {
			return err
		}
		full = false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
		}
	}
}

// uses reports whether the proxy uses the services of view number n, or newer ones.
func (s *session) uses(n uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current >= n && s.acked >= min(s.sent, n)
}

// toldOf reports whether the proxy was told of view number n.
func (s *session) toldOf(n uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current >= n
}

func (s *session) update(v *view, full bool) error {
	c, _, err := s.w.configuration(false)
	if err != nil {
		return err
	}
	c.Listeners, c.Config, c.Successor = s.configured.Listeners, s.configured.Config, s.configured.Successor
	c.Identity = s.configured.Identity // a proxy has one for life
	if !reflect.DeepEqual(c, s.configured) {
		again := c
		again.Listeners = nil
		// What changes with the services, and must not go back to what it was at the beginning.
		again.Config = v.config(s.w.namespace())
		if err := s.conn.Send(link.KindConfigure, 0, again); err != nil {
			return err
		}
		s.configured = c
	}
	if version, fd, err := s.w.a.tableAfter(s.table); err != nil {
		return err
	} else if fd >= 0 {
		err = s.conn.Send(link.KindTable, 0, link.Table{Version: version}, fd)
		s.table = version
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if err := s.updateServices(v, full); err != nil {
		return err
	}
	if err := s.updateWatches(v); err != nil {
		return err
	}
	s.mu.Lock()
	news := s.current != v.number
	s.current = v.number
	s.mu.Unlock()
	if news {
		s.w.wakeUp() // the view may have had nothing for the proxy to acknowledge
	}
	if v.bundle != nil && v.bundle.Version != s.bundle {
		if err := s.conn.Send(link.KindBundle, 0, v.bundle); err != nil {
			return err
		}
		s.bundle = v.bundle.Version
	}
	return nil
}

// updateServices tells what is different in v from what was told last, or everything.
func (s *session) updateServices(v *view, full bool) error {
	from := s.told
	if full {
		from = nil
	}
	delta := s.w.a.deltas.between(from, v, s.w.namespace(), s.patches)
	if delta.err != nil {
		return delta.err
	}
	if delta.body != nil {
		s.sending(v.number, full)
		if err := s.conn.Send(link.KindServices, 0, delta.body); err != nil {
			return err
		}
	}
	s.told = v
	return nil
}

// sending notes what the proxy is asked to use. How soon it does is a matter of changes: what
// a proxy is told at its beginning is as old as it is.
func (s *session) sending(view uint64, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = view
	if full {
		s.first = view
	}
	if since := s.w.a.converge.since(s.current, view); !full && !since.IsZero() && len(s.pending) < recent {
		s.pending = append(s.pending, delta{view, since})
	}
}
