// Command bench compares the hop of the mesh with its peers, in one run on one
// machine: a client, a proxy, mutual TLS 1.3, a proxy, and nginx behind it. The
// peers are a pair of nginx, a pair of HAProxy, and no proxy at all; Assay is a
// real `assay up` with two workloads under `assay run`, signals on.
//
// It refuses to compare runs: only numbers of one run share the machine's mood,
// so every number is printed with its ratio to nginx's of the same run, and each
// point is measured several times, one contender after the other in turn; the
// median counts.
//
// CPU per request is user plus system time of exactly the proxy processes of the
// pair (masters and workers; not the client, not the backend) over the requests
// that the client counted. All contenders stand on the same two kinds of host:
// network namespaces joined by a bridge.
//
// What each peer really does: nginx speaks HTTP/2 with the client and HTTP/1.1 behind it,
// as it does for everybody, and gRPC on every leg; HAProxy speaks HTTP/2 on every leg;
// opaque bytes pass nginx's stream module and HAProxy's tcp mode, a TLS connection for
// each connection.
//
// Envoy, linkerd2-proxy and ztunnel are not compared, since they cannot be installed by a
// package's name: Debian has none of them, the registries' packages named envoy are something
// else, and that named linkerd2-proxy is an empty one.
//
// Tour: main.go (the run), contender.go (what is compared), peers.go (nginx and
// HAProxy), mesh.go (Assay), app.go (the application beside nginx), certs.go, load.go (wrk
// and reading /proc), wire.go (HTTP/2, gRPC, opaque TCP), talk.go (a client for what has
// none), idle.go, report.go (Markdown and JSON), goals.go, engines.go (the engines by themselves).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"assay.dev/test/lab"
)

type options struct {
	short      bool
	repeats    int
	duration   time.Duration
	json       string
	contenders string
	points     string
	verbose    bool
	check      bool
	hold       bool
	engines    bool
}

func main() {
	lab.Init()
	if len(os.Args) > 2 && (os.Args[1] == "serve" || os.Args[1] == "talk") {
		role := map[string]func([]string) error{"serve": serve, "talk": talkMain}[os.Args[1]]
		if err := role(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench "+os.Args[1]+":", err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.BoolVar(&o.short, "short", false, "one repeat, short loads: two or three minutes")
	flag.IntVar(&o.repeats, "repeats", 3, "how often each point is measured")
	flag.DurationVar(&o.duration, "duration", 2*time.Second, "how long each load lasts")
	flag.StringVar(&o.json, "json", "", "write the results as JSON to this `file`")
	flag.StringVar(&o.contenders, "contenders", "direct,nginx,haproxy,assay", "what to compare, of direct, nginx, haproxy, assay")
	flag.StringVar(&o.points, "points", "all", "which loads to measure: connections of small requests, bulk, churn, h2, grpc, stream, tcp (or one of those by its name), idle")
	flag.BoolVar(&o.check, "check", false, "exit with 2 when a goal is missed")
	flag.BoolVar(&o.hold, "hold", false, "measure nothing: say where the contenders are and keep them until interrupted, to be profiled")
	flag.BoolVar(&o.engines, "engines", false, "run the engines' own benchmarks instead, with their limits of allocations")
	flag.BoolVar(&o.verbose, "v", false, "show each measurement")
	flag.Parse()
	if o.short {
		o.repeats, o.duration = 1, time.Second
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if o.engines {
		if err := engines(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	r := newRun(ctx, o.verbose)
	var res *results
	err := r.do(func() { res = bench(r, o) })
	lab.RemoveBuilds()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	if o.check && slices.ContainsFunc(res.goals(), func(g goal) bool { return !g.met() }) {
		os.Exit(2)
	}
}

// concurrency are the points of the small-request table.
var concurrency = []int{1, 8, 64, 256, 1000}

const (
	bulkConcurrency = 4
	idleConnections = 10000
)

// wants reports whether a point is to be measured.
func (o options) wants(names ...string) bool {
	list := strings.Split(o.points, ",")
	return o.points == "all" || slices.ContainsFunc(names, func(name string) bool { return slices.Contains(list, name) })
}

func bench(r *run, o options) *results {
	os.Setenv(lab.EndToEnd, "1")
	names := strings.Split(o.contenders, ",")
	lab.Require(r, "nginx", "haproxy", "wrk", "h2load", "ip", "nft", "ss")
	res := newResults(o)
	self, err := lab.Build("assay.dev/bench")
	if err != nil {
		r.Fatalf("%v", err)
	}
	l := lab.New(r)
	r.self, r.lab = self, l
	l.Write(r, percentileFile, percentileScript)
	l.Write(r, grpcBodyFile, string(grpcBody))
	pki, err := newPKI()
	if err != nil {
		r.Fatalf("certificates: %v", err)
	}
	var field []*contender
	for _, name := range names {
		var c *contender
		switch name {
		case "direct":
			c = newDirect(r, l)
		case "nginx":
			c = newNginx(r, l, pki)
		case "haproxy":
			c = newHAProxy(r, l, pki)
		case "assay":
			c = newAssay(r, l, res)
		default:
			r.Fatalf("contender %q: want direct, nginx, haproxy or assay", name)
		}
		c.check(r)
		c.idle = readMemory(c.proxies())
		res.Idle[c.name] = c.idle
		field = append(field, c)
	}
	for _, c := range field {
		c.warm(r)
	}
	if o.hold {
		hold(r, field)
		return res
	}
	for rep := range o.repeats {
		for _, n := range concurrency {
			if o.wants(strconv.Itoa(n)) {
				inTurn(field, rep, func(c *contender) {
					res.small(c.name, n, c.measure(r, load{path: "/", connections: n, duration: o.lasting(n)}))
				})
			}
		}
		if o.wants("bulk") {
			inTurn(field, rep, func(c *contender) {
				res.bulk(c.name, c.measure(r, load{path: "/1m", connections: bulkConcurrency, duration: o.duration}))
			})
		}
		if o.wants("churn") {
			inTurn(field, rep, func(c *contender) {
				res.churn(c.name, c.measure(r, load{path: "/", connections: 16, duration: o.duration, fresh: true}))
			})
		}
		for _, p := range wirePoints {
			if o.wants(p.kind, p.name()) {
				inTurn(field, rep, func(c *contender) {
					if c.has(p.kind) {
						res.add(c.name, p.name(), c.measureWire(r, p, o.duration))
					}
				})
			}
		}
	}
	if o.wants("idle") {
		for _, c := range field {
			if c.name != "direct" {
				res.PerIdle[c.name] = c.perIdle(r, idleConnections)
			}
		}
	}
	for _, c := range field {
		res.After[c.name] = readMemory(c.proxies())
	}
	res.finish()
	res.markdown(os.Stdout)
	if o.json != "" {
		if err := res.writeJSON(o.json); err != nil {
			r.Fatalf("write results: %v", err)
		}
	}
	return res
}

// hold says how to reach the contenders from another terminal, and waits.
func hold(r *run, field []*contender) {
	for _, c := range field {
		fmt.Printf("%s: proxies %v: %s wrk -t1 -c64 -d5s --latency %s/\n", c.name, c.proxies(), c.client.Enter(), c.url(portHTTP1))
	}
	<-r.ctx.Done()
}

// lasting is how long n connections are measured: to make a thousand takes a while.
func (o options) lasting(n int) time.Duration {
	if n >= 1000 {
		return max(o.duration, 4*time.Second)
	}
	return o.duration
}

// inTurn measures one after the other, and starts each round with another one, so
// that none always follows the same. No proxy at all needs one round only.
func inTurn(field []*contender, round int, measure func(*contender)) {
	k := round % max(len(field), 1)
	for _, c := range slices.Concat(field[k:], field[:k]) {
		if c.name != "direct" || round == 0 {
			measure(c)
		}
	}
}

// run is the lab's test: one that prints instead of failing a suite.
type run struct {
	ctx     context.Context
	lab     *lab.Lab
	self    string // this program, as it is found in the lab
	verbose bool
	failed  bool
	clean   []func()
}

func newRun(ctx context.Context, verbose bool) *run { return &run{ctx: ctx, verbose: verbose} }

type stop struct{ error }

// do runs fn and then, whatever happened, what was to be cleaned up.
func (r *run) do(fn func()) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case stop:
			err = p.error
		default:
			panic(p)
		}
	}()
	defer func() {
		for _, f := range slices.Backward(r.clean) {
			f()
		}
	}()
	fn()
	if r.failed {
		return errors.New("something went wrong, see above")
	}
	return nil
}

func (r *run) Helper()                  {}
func (r *run) Name() string             { return "bench" }
func (r *run) Context() context.Context { return r.ctx }
func (r *run) Failed() bool             { return r.failed }
func (r *run) Cleanup(f func())         { r.clean = append(r.clean, f) }
func (r *run) Logf(format string, args ...any) {
	if r.verbose || r.failed {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}
func (r *run) Errorf(format string, args ...any) {
	r.failed = true
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}
func (r *run) Fatalf(format string, args ...any) {
	r.failed = true
	panic(stop{fmt.Errorf(format, args...)})
}
func (r *run) Skipf(format string, args ...any) { panic(stop{fmt.Errorf(format, args...)}) }
