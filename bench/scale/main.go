// Command scale measures what a cluster costs control: `assay control --kubernetes`, the real
// program as a process of its own, between an API server and the agents of all nodes, at
// twenty pod changes a second. It prints memory, processor time, how long a change takes to
// every host, and what it costs when all hosts come back at once, for several sizes of
// cluster, so that the growth shows.
//
// The API server is ours (apiserver.go). A real one was tried: with its etcd and 5,000 pods it
// has 700 MB and takes as much of the processors as what is measured, which shares them;
// to fill it takes most of a minute, and to compile it where there is none a quarter of an
// hour. What control sees is the same: HTTP/2 and TLS, streaming lists and watches with
// versions and bookmarks, protobuf, objects as large as real ones.
//
// The agents join, renew and are verified by package agent's client, and report what real
// ones do: each pod with its artifacts, acknowledgements of bundles, a request for a
// certificate for each new pod and twice a day for each old one, and, once a second, the
// counts of every proxy, as in a mesh where every pod has traffic in every second. Of what
// they are told they keep keys and versions alone, so that a hundred of them cost less than
// control. A change has arrived when the agent has read it. How long it takes from there into
// a proxy is measured on one node more, whose agent and proxies are the real ones (real.go).
//
// It refuses to guess: processor time is that of control's process (/proc/PID/stat), the
// heap in use is what its runtime says at each collection, and a change that some host has
// not heard within 30 s is counted as lost.
//
// Tour: main.go (the run), stage.go (one size), process.go (control's process), world.go and
// objects.go (the cluster), churn.go (changes and their delays), apiserver.go, host.go and
// wire.go (agents), real.go (the node with proxies), report.go (tables and goals).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type options struct {
	pods    []int
	steady  time.Duration
	window  time.Duration
	rate    int
	peers   int
	json    string
	profile string
	check   bool
	verbose bool
	keep    bool
	real    bool
}

func main() {
	var o options
	var sizes string
	flag.StringVar(&sizes, "pods", "1250,2500,5000,10000", "sizes of cluster")
	flag.DurationVar(&o.steady, "steady", 40*time.Second, "how long the steady state is measured")
	flag.DurationVar(&o.window, "window", 30*time.Second, "the time over which the cost of a reconnect is compared with the steady cost")
	flag.IntVar(&o.rate, "rate", 20, "pod changes a second")
	flag.IntVar(&o.peers, "peers", 8, "with how many others each pod has traffic; 0: nobody reports any")
	flag.StringVar(&o.json, "json", "", "write the results as JSON to this `file`")
	flag.StringVar(&o.profile, "profile", "", "write profiles of control to this `folder`")
	flag.BoolVar(&o.check, "check", false, "exit with 2 when a goal is missed")
	flag.BoolVar(&o.verbose, "v", false, "say what is done")
	flag.BoolVar(&o.keep, "keep", false, "keep control's log")
	flag.BoolVar(&o.real, "real", os.Geteuid() == 0, "one node more, with a real agent and a proxy in each pod (needs root)")
	node := flag.Bool("node", false, "be that node (for this program itself)")
	flag.Parse()
	if *node {
		if err := runReal(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "scale: the real node:", err)
			os.Exit(1)
		}
		return
	}
	for text := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			fmt.Fprintf(os.Stderr, "scale: -pods %s: want numbers with commas between them\n", sizes)
			os.Exit(1)
		}
		o.pods = append(o.pods, n)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	r, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
	if o.check && slices.ContainsFunc(r.goals(), func(g goal) bool { return !g.met() }) {
		os.Exit(2)
	}
}

func run(ctx context.Context, o options) (*results, error) {
	dir, err := os.MkdirTemp("", "assay-scale-")
	if err != nil {
		return nil, err
	}
	if o.keep {
		fmt.Fprintln(os.Stderr, "scale: kept:", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	program := filepath.Join(dir, "assay")
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
	if o.profile != "" {
		args = append(args, "-tags", "assay_profile")
		if err := os.MkdirAll(o.profile, 0o755); err != nil {
			return nil, err
		}
	}
	build := exec.CommandContext(ctx, "go", append(args, "assay.dev/cmd/assay", "assay.dev/cmd/assay-proxy")...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build: %w\n%s", err, out)
	}
	r := newResults(o)
	for _, pods := range o.pods {
		size, err := measure(ctx, o, program, filepath.Join(dir, strconv.Itoa(pods)), pods)
		if err != nil {
			return nil, fmt.Errorf("%d pods: %w", pods, err)
		}
		r.Sizes = append(r.Sizes, size)
	}
	r.markdown(os.Stdout)
	if o.json != "" {
		return r, r.writeJSON(o.json)
	}
	return r, nil
}
