package cluster

import (
	"context"
	"fmt"
	"time"

	"k8s.io/client-go/dynamic"
)

// search looks for the definitions that the API server has. Somebody may install
// the Gateway API, or upgrade it, at any time.
type search struct {
	w       *Watcher
	client  dynamic.Interface
	missing []definition
}

const searchEvery = 10 * time.Second

func (w *Watcher) newSearch() (*search, error) {
	client, err := dynamic.NewForConfig(w.config)
	if err != nil {
		return nil, fmt.Errorf("client of the API server %s: %w", w.config.Host, err)
	}
	return &search{w: w, client: client, missing: definitions}, nil
}

// begin returns the kinds that are there at the beginning, as soon as the API server
// answers.
func (s *search) begin(ctx context.Context) ([]*kind, error) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for said := false; ; {
		found, err := s.look(ctx)
		if err == nil {
			return found, nil
		}
		if !said && ctx.Err() == nil {
			said = true
			s.w.log.Warn("the API server does not answer; waiting for it", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// look returns those of the missing kinds that are there now. Unless all could be asked
// for, none is.
func (s *search) look(ctx context.Context) ([]*kind, error) {
	var found []*kind
	var missing []definition
	var names []string
	for _, d := range s.missing {
		version, err := s.w.served(ctx, d)
		if err != nil {
			return nil, err
		}
		if version == "" {
			missing, names = append(missing, d), append(names, d.kind)
			continue
		}
		found = append(found, s.w.definitionKind(s.client, d, version))
	}
	s.missing = missing
	s.w.change(func() { s.w.model.setMissing(names) })
	return found, nil
}

// goOn looks for what is missing until nothing is.
func (s *search) goOn(ctx context.Context, start func(*kind)) {
	tick := time.NewTicker(searchEvery)
	defer tick.Stop()
	for len(s.missing) > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		found, err := s.look(ctx)
		if err != nil {
			continue // the reflectors say it
		}
		for _, k := range found {
			start(k)
		}
	}
}
