package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"assay.dev"
	"assay.dev/agent"
	"assay.dev/agent/netns"
)

// One node more than the others is real: an agent in a process of its own (this program again),
// a network namespace for each of its pods, and in each of them assay-proxy with its rules and
// its certificate. So the way of a change is measured to its end, and what it costs there.

// realNode is what its process is told.
type realNode struct {
	Name    string    `json:"name"`
	Control string    `json:"control"`
	Roots   [][]byte  `json:"roots"`
	Dir     string    `json:"dir"`
	Proxy   string    `json:"proxy"`
	Pods    []realPod `json:"pods"`
}

type realPod struct {
	ID        string     `json:"id"`
	Namespace string     `json:"namespace"`
	Account   string     `json:"account"`
	Addr      netip.Addr `json:"addr"`
}

// last is what one real node costs, and how late its proxies are. Sizes are bytes, times are
// seconds.
type last struct {
	Pods    int     `json:"pods"`
	CPU     float64 `json:"cpu"` // processors, of the agent
	RSS     float64 `json:"rss"`
	Proxies float64 `json:"proxies"` // processors, of all proxies
	Proxy   float64 `json:"proxy"`   // bytes of each, what it shares counted in parts
	P50     float64 `json:"p50"`     // from a change's arrival at the agent to a proxy that uses it
	P99     float64 `json:"p99"`
	Count   float64 `json:"count"`
}

// runReal is the node's process. It ends with its standard input.
func runReal(in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	first, err := lines.ReadBytes('\n')
	if err != nil {
		return err
	}
	var n realNode
	if err := json.Unmarshal(first, &n); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		io.Copy(io.Discard, lines)
		cancel()
	}()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	remote, err := agent.Connect(ctx, agent.RemoteConfig{
		Address: n.Control, DataDir: n.Dir, HostName: n.Name, Log: log,
		Node: &agent.NodeJoin{Token: func() (string, error) { return agentToken(n.Name), nil }, Roots: n.roots},
	})
	if err != nil {
		return err
	}
	defer remote.Close()
	metrics, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		Hosts: remote, Bundle: remote.SetBundle, DataDir: n.Dir, RuntimeDir: filepath.Join(n.Dir, "run"), HostName: n.Name,
		Proxy: n.Proxy, Metrics: metrics, EndWorkloads: true, Last: true, Log: log,
	})
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	all.Go(func() { remote.Run(ctx) })
	ended := make(chan error, 1)
	all.Go(func() { ended <- a.Run(ctx); cancel() })
	for _, p := range n.Pods {
		ns, err := p.namespace()
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := a.Mesh(ctx, agent.Pod{ID: p.ID, Namespace: p.Namespace, Account: p.Account, Addrs: []netip.Addr{p.Addr}, Ports: []uint16{8080},
			NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD())}); err != nil {
			return err
		}
		if err := a.Attest(p.ID, assay.ArtifactSet{{Kind: assay.Image, Name: "app", Digest: image}}); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, metrics.Addr())
	return <-ended
}

func (n *realNode) roots(context.Context) (list []*x509.Certificate, err error) {
	for _, der := range n.Roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// namespace makes the pod's network: a link with its address, and nobody at the other end.
func (p *realPod) namespace() (*netns.Namespace, error) {
	ns, err := netns.Create()
	if err != nil {
		return nil, err
	}
	err = ns.Do(func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: netns.Interface}, PeerName: "nobody"}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("network of a pod: %w", err)
	}
	return ns, nil
}

// realProcess is the real node, as the bench has it.
type realProcess struct {
	pods    int
	cmd     *exec.Cmd
	in      io.WriteCloser
	metrics string
}

// startReal starts it and waits until its pods are meshed.
func startReal(n realNode) (*realProcess, error) {
	p := &realProcess{pods: len(n.Pods), cmd: exec.Command("/proc/self/exe", "-node")}
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(p.in).Encode(n); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, errors.Join(errors.New("the real node ended before its pods were meshed"), p.stop())
	}
	p.metrics = "http://" + strings.TrimSpace(line) + "/metrics"
	return p, nil
}

func (p *realProcess) stop() error {
	p.in.Close()
	kill := time.AfterFunc(30*time.Second, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	return p.cmd.Wait()
}

// reading is what the node has used, and how late its proxies have been so far.
type reading struct {
	agent   usage
	proxies time.Duration
	memory  float64 // of each proxy
	late    cumulated
}

func (p *realProcess) read() (r reading, err error) {
	if r.late, err = p.delays(); err != nil {
		return r, err
	}
	if r.agent, err = usageOf(p.cmd.Process.Pid); err != nil {
		return r, err
	}
	list, err := descendants(p.cmd.Process.Pid)
	if err != nil {
		return r, err
	}
	for _, pid := range list {
		u, err := usageOf(pid)
		if err != nil {
			return r, err
		}
		r.proxies += u.cpu
		r.memory += float64(proportional(pid)) / float64(len(list))
	}
	return r, nil
}

// measured compares two readings.
func (p *realProcess) measured(before, after reading) *last {
	seconds := after.agent.at.Sub(before.agent.at).Seconds()
	l := &last{
		Pods: p.pods, CPU: (after.agent.cpu - before.agent.cpu).Seconds() / seconds, RSS: float64(after.agent.rss),
		Proxies: (after.proxies - before.proxies).Seconds() / seconds, Proxy: after.memory,
	}
	l.P50, l.Count = after.late.quantile(before.late, 0.5)
	l.P99, _ = after.late.quantile(before.late, 0.99)
	return l
}

// cumulated is a histogram of Prometheus: how many were at most so late, by seconds.
type cumulated []struct{ most, count float64 }

// delays reads the agent's histogram.
func (p *realProcess) delays() (c cumulated, err error) {
	answer, err := http.Get(p.metrics)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		text, is := strings.CutPrefix(lines.Text(), `assay_proxy_convergence_seconds_bucket{le="`)
		if !is {
			continue
		}
		bound, count, _ := strings.Cut(text, `"} `)
		var one struct{ most, count float64 }
		if one.most, err = strconv.ParseFloat(bound, 64); err == nil {
			one.count, err = strconv.ParseFloat(count, 64)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", lines.Text(), err)
		}
		c = append(c, one)
	}
	return c, lines.Err()
}

// upTo returns how many were at most so late. Bounds between which nothing lies are left out.
func (c cumulated) upTo(most float64) (count float64) {
	for _, one := range c {
		if one.most <= most {
			count = one.count
		}
	}
	return count
}

// quantile is that of what came after before, and how many that were.
func (c cumulated) quantile(before cumulated, q float64) (at, count float64) {
	if len(c) == 0 {
		return 0, 0
	}
	total := c[len(c)-1].count - before.upTo(c[len(c)-1].most)
	for _, one := range c {
		if one.count-before.upTo(one.most) >= q*total {
			return one.most, total
		}
	}
	return 0, total
}

// descendants are the processes below one.
func descendants(pid int) (list []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parents := map[int]int{}
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			if stat, err := os.ReadFile("/proc/" + e.Name() + "/stat"); err == nil {
				_, rest, _ := strings.Cut(string(stat), ") ")
				if f := strings.Fields(rest); len(f) > 1 {
					parents[n], _ = strconv.Atoi(f[1])
				}
			}
		}
	}
	for n := range parents {
		for at := parents[n]; at > 1; at = parents[at] {
			if at == pid {
				list = append(list, n)
				break
			}
		}
	}
	slices.Sort(list)
	return list, nil
}

// proportional is a process's memory in bytes, where what it shares with others is divided.
func proportional(pid int) int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(text)) {
		if value, is := strings.CutPrefix(line, "Pss:"); is {
			kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return kb << 10
		}
	}
	return 0
}
