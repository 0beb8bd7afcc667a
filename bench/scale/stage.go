package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// stage is one size of cluster, with control between its parts.
type stage struct {
	o       options
	api     *apiServer
	w       *world
	control *controlProcess
	hosts   []*host
	churn   *churn
	real    *realProcess // nil: none
	proxy   string       // its program
	log     *slog.Logger
}

// size is what one size of cluster costs. Sizes are bytes, times are seconds.
type size struct {
	Pods     int     `json:"pods"`
	Services int     `json:"services"`
	Nodes    int     `json:"nodes"`
	Heard    float64 `json:"heard"`  // control's start to the first host that could join
	Meshed   float64 `json:"meshed"` // to all pods known, and certified, everywhere
	// Steady: changes, reports of all proxies, renewals.
	CPU       float64 `json:"cpu"` // processors
	RSS       float64 `json:"rss"`
	Peak      float64 `json:"peak"`
	Heap      float64 `json:"heap"`      // in use after a collection
	Sent      float64 `json:"sent"`      // bytes a second to all hosts
	Watched   float64 `json:"watched"`   // bytes a second from the API server
	Issued    float64 `json:"issued"`    // certificates a second
	Delay     delays  `json:"delay"`     // of changes, to each host
	Last      *last   `json:"last"`      // of one real node
	Reconnect trouble `json:"reconnect"` // all streams end at once
	Restart   trouble `json:"restart"`   // control is ended and starts anew
}

// trouble is what it costs that all hosts come at once.
type trouble struct {
	InSync float64 `json:"inSync"` // until every host has everything
	CPU    float64 `json:"cpu"`    // processor seconds in the window
	Ratio  float64 `json:"ratio"`  // to the steady cost of as long a time
	Peak   float64 `json:"peak"`   // bytes of memory
	Delay  delays  `json:"delay"`  // of changes in the window
}

func measure(ctx context.Context, o options, program, dir string, pods int) (_ size, err error) {
	level := slog.LevelWarn
	if o.verbose {
		level = slog.LevelInfo
	}
	s := &stage{o: o, log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return size{}, err
	}
	if s.api, err = newAPIServer(); err != nil {
		return size{}, err
	}
	defer s.api.close()
	s.w = newWorld(s.api, pods, o.peers)
	if o.real {
		s.proxy = filepath.Join(filepath.Dir(program), "assay-proxy")
		s.w.addReal()
	}
	s.w.write()
	var env []string
	if o.profile != "" {
		env = append(env, "ASSAY_PROFILE="+filepath.Join(dir, "profile.sock"))
	}
	if s.control, err = newControlProcess(program, dir, s.api.kubeconfig(), env); err != nil {
		return size{}, err
	}
	defer s.control.log.Close()
	defer func() { err = errors.Join(err, s.control.stop()) }()
	s.churn = &churn{w: s.w, rate: o.rate, tracked: tracker{open: map[string]*expected{}}}
	for _, n := range s.w.nodes {
		h, err := newHost(n, s.api, &s.churn.tracked, s.control.address, filepath.Join(dir, n.name), s.log)
		if err != nil {
			return size{}, err
		}
		s.hosts = append(s.hosts, h)
	}
	s.churn.hosts = s.hosts
	for _, p := range s.w.pods() {
		p.node.host.mesh(p, s.w.peers())
	}
	defer func() {
		if s.real != nil {
			err = errors.Join(err, s.real.stop())
		}
	}()
	return s.play(ctx)
}

// startReal has one more node join, whose proxies are real.
func (s *stage) startReal() (err error) {
	n := realNode{Name: s.w.real.pods[0].node.name, Control: s.control.address, Dir: filepath.Join(s.control.dir, "real"), Proxy: s.proxy}
	roots, err := s.api.roots()
	if err != nil {
		return err
	}
	for _, c := range roots {
		n.Roots = append(n.Roots, c.Raw)
	}
	for _, p := range s.w.real.pods {
		n.Pods = append(n.Pods, realPod{ID: p.uid, Namespace: p.service.namespace, Account: p.service.name, Addr: p.addr})
	}
	s.real, err = startReal(n)
	return err
}

// play is the run: a cold start, the steady state, a network that fails, a new control.
func (s *stage) play(ctx context.Context) (out size, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	out = size{Pods: len(s.w.pods()), Services: len(s.w.services), Nodes: len(s.w.nodes)}
	began := time.Now()
	if err := s.control.start(ctx); err != nil {
		return out, err
	}
	for _, h := range s.hosts {
		all.Go(func() { h.run(ctx) })
	}
	if err := s.wait(ctx, "a host joins", func() bool { return s.some(func(h *host) bool { return h.whole.Load() }) }); err != nil {
		return out, err
	}
	out.Heard = time.Since(began).Seconds()
	if s.w.real != nil {
		if err := s.startReal(); err != nil {
			return out, err
		}
	}
	meshed := func() bool {
		issued := int64(0)
		for _, h := range s.hosts {
			issued += h.issued.Load()
		}
		return issued >= int64(out.Pods) && s.inSync()
	}
	if err := s.wait(ctx, "every pod is everywhere", meshed); err != nil {
		return out, err
	}
	out.Meshed = time.Since(began).Seconds()
	s.log.Info("meshed", "pods", out.Pods, "after", out.Meshed)

	all.Go(func() { s.churn.run(ctx) })
	if err := pause(ctx, 10*time.Second); err != nil { // what the start has left behind is cleared away
		return out, err
	}
	if err := s.steady(ctx, &out); err != nil {
		return out, err
	}
	s.log.Info("steady", "cpu", out.CPU, "rss", out.RSS, "p99", out.Delay.P99)
	steady := out.CPU * s.o.window.Seconds()
	if out.Reconnect, err = s.trouble(ctx, "reconnect", steady, func() error {
		for _, h := range s.hosts {
			h.disconnect()
		}
		return nil
	}); err != nil {
		return out, err
	}
	out.Restart, err = s.trouble(ctx, "restart", steady, func() error {
		return errors.Join(s.control.stop(), s.control.start(ctx))
	})
	return out, err
}

// steady measures the steady state.
func (s *stage) steady(ctx context.Context, out *size) error {
	if err := s.control.resetPeak(); err != nil {
		return err
	}
	s.churn.tracked.begin()
	first, err := s.usage()
	if err != nil {
		return err
	}
	var before reading
	if s.real != nil {
		if before, err = s.real.read(); err != nil {
			return err
		}
	}
	issued := s.issued()
	profiled := s.profile(ctx, out.Pods, "steady")
	var rss, live []float64
	for time.Since(first.at) < s.o.steady {
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		u, err := s.usage()
		if err != nil {
			return err
		}
		rss, live = append(rss, float64(u.rss)), append(live, u.live)
	}
	last, err := s.usage()
	if err != nil {
		return err
	}
	seconds := last.at.Sub(first.at).Seconds()
	out.CPU = (last.cpu - first.cpu).Seconds() / seconds
	out.RSS, out.Heap, out.Peak = median(rss), median(live), float64(last.peak)
	out.Sent = float64(last.received-first.received) / seconds
	out.Watched = float64(last.watched-first.watched) / seconds
	out.Issued = float64(s.issued()-issued) / seconds
	if s.real != nil {
		after, err := s.real.read()
		if err != nil {
			return err
		}
		out.Last = s.real.measured(before, after)
	}
	out.Delay = s.churn.tracked.end(ctx)
	return profiled()
}

// trouble makes all hosts come at once, and measures a window from then on. A control that is
// new is measured from its start.
func (s *stage) trouble(ctx context.Context, name string, steady float64, make func() error) (t trouble, err error) {
	if err := s.control.resetPeak(); err != nil {
		return t, err
	}
	before, err := s.usage()
	if err != nil {
		return t, err
	}
	old := s.control.cmd.Process.Pid
	s.churn.tracked.begin()
	began := time.Now()
	if err := make(); err != nil {
		return t, err
	}
	if s.control.cmd.Process.Pid != old {
		before = usage{}
	}
	profiled := s.profile(ctx, len(s.w.pods()), name)
	came := func() bool {
		return s.every(func(h *host) bool { return h.wholeAt.Load() > began.UnixNano() }) && s.inSync()
	}
	if err := s.wait(ctx, "every host is back", came); err != nil {
		return t, err
	}
	for _, h := range s.hosts {
		t.InSync = max(t.InSync, time.Unix(0, h.wholeAt.Load()).Sub(began).Seconds())
	}
	if err := pause(ctx, s.o.window-time.Since(began)); err != nil {
		return t, err
	}
	after, err := s.usage()
	if err != nil {
		return t, err
	}
	t.CPU, t.Peak = (after.cpu - before.cpu).Seconds(), float64(after.peak)
	t.Ratio = t.CPU / steady
	t.Delay = s.churn.tracked.end(ctx)
	s.log.Info(name, "in sync", t.InSync, "ratio", t.Ratio, "p99", t.Delay.P99)
	return t, profiled()
}

func (s *stage) usage() (usage, error) {
	u, err := s.control.usage()
	u.received, u.watched = bytesIn.Load(), s.api.written()
	return u, err
}

func (s *stage) issued() (n int64) {
	for _, h := range s.hosts {
		n += h.issued.Load()
	}
	return n
}

func (s *stage) every(ok func(*host) bool) bool {
	return !s.some(func(h *host) bool { return !ok(h) })
}

func (s *stage) some(ok func(*host) bool) bool {
	for _, h := range s.hosts {
		if ok(h) {
			return true
		}
	}
	return false
}

// inSync reports whether every host has every piece, but for the few that are changing.
func (s *stage) inSync() bool {
	want := s.w.resources()
	return s.every(func(h *host) bool {
		have := h.count()
		return h.whole.Load() && have >= want-s.o.rate && have <= want+s.o.rate
	})
}

// patience bounds each part of a run on a busy machine.
const patience = 5 * time.Minute

func (s *stage) wait(ctx context.Context, what string, ok func() bool) error {
	for began := time.Now(); !ok(); {
		if time.Since(began) > patience {
			return fmt.Errorf("%s: not within %s; see -keep", what, patience)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// profile collects a profile of the processors while something is measured, and one of the
// memory at its end.
func (s *stage) profile(ctx context.Context, pods int, name string) func() error {
	if s.o.profile == "" {
		return func() error { return nil }
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(s.control.dir, "profile.sock"))
	}}}
	get := func(path, file string) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://control/debug/pprof/"+path, nil)
		if err != nil {
			return err
		}
		answer, err := client.Do(r)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		f, err := os.Create(filepath.Join(s.o.profile, fmt.Sprintf("%s-%d.%s", name, pods, file)))
		if err != nil {
			return err
		}
		_, err = io.Copy(f, answer.Body)
		return errors.Join(err, f.Close())
	}
	seconds := int(s.o.window.Seconds()) - 2
	done := make(chan error, 1)
	go func() { done <- get(fmt.Sprintf("profile?seconds=%d", seconds), "cpu") }()
	return func() error { return errors.Join(<-done, get("heap?gc=1", "heap")) }
}
