package agent

import (
	"context"
	"reflect"

	"assay.dev"
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
		again.Config = v.config(s.w.noun().Namespace)
		if err := s.conn.Send(link.KindConfigure, 0, again); err != nil {
			return err
		}
		s.configured = c
	}
	if version, fd, err := s.w.a.tableCopy(); err != nil {
		return err
	} else if fd >= 0 {
		if version != s.table {
			err = s.conn.Send(link.KindTable, 0, link.Table{Version: version}, fd)
			s.table = version
		}
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

func (s *session) updateServices(v *view, full bool) error {
	delta := link.Services{Version: v.number, Full: full}
	for key, x := range v.services {
		if sent, ok := s.services[key]; !ok || sent != x.version {
			delta.Upsert = append(delta.Upsert, *x.service)
		}
	}
	for key := range s.services {
		if _, there := v.services[key]; !there {
			delta.Remove = append(delta.Remove, key)
			delete(s.services, key)
		}
	}
	namespace := s.w.noun().Namespace
	for key, x := range v.routes {
		if sent, ok := s.routes[key]; !ok || sent != x.version {
			if r, here := routeFor(x.route, namespace); here {
				delta.Routes = append(delta.Routes, r)
			} else if ok {
				delta.RemoveRoutes = append(delta.RemoveRoutes, key)
			}
		}
	}
	for key := range s.routes {
		if _, there := v.routes[key]; !there {
			delta.RemoveRoutes = append(delta.RemoveRoutes, key)
			delete(s.routes, key)
		}
	}
	if config := v.config(namespace); full || !reflect.DeepEqual(config, s.namespace) {
		delta.Config, s.namespace = &config, config
	}
	if !full && len(delta.Upsert) == 0 && len(delta.Remove) == 0 && delta.Config == nil && len(delta.Routes) == 0 && len(delta.RemoveRoutes) == 0 {
		return nil
	}
	s.sending(v.number, full)
	if err := s.conn.Send(link.KindServices, 0, delta); err != nil {
		return err
	}
	for key, x := range v.services {
		s.services[key] = x.version
	}
	for key, x := range v.routes {
		s.routes[key] = x.version
	}
	return nil
}

// sending notes what the proxy is asked to use. How soon it does is a matter of changes: what
// a proxy is told at its beginning is as old as it is.
func (s *session) sending(view uint64, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = view
	if since := s.w.a.converge.since(s.current, view); !full && !since.IsZero() && len(s.pending) < recent {
		s.pending = append(s.pending, delta{view, since})
	}
}

// routeFor returns what of a route workloads of a namespace meet: a consumer's route is
// for its own namespace alone.
func routeFor(r *assay.Route, namespace string) (assay.Route, bool) {
	out := *r
	out.Parents = nil
	for _, p := range r.Parents {
		if r.Producer(p) || r.Namespace == namespace {
			out.Parents = append(out.Parents, p)
		}
	}
	return out, len(out.Parents) > 0
}
