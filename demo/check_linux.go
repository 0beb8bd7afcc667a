package demo

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/demo/wire"
)

// play is one run of the check.
type play struct {
	*Stage
	ev      evidence
	tell    func(format string, args ...any)
	earlier []assay.Edge // told by control before it was killed
}

// Check plays the bank unattended and returns the verdicts. progress gets a line for
// each act. The error is for what kept the play from being finished; then there is
// no verdict.
func (s *Stage) Check(ctx context.Context, progress io.Writer) ([]Verdict, error) {
	begun := time.Now()
	p := &play{Stage: s, tell: func(format string, args ...any) {
		fmt.Fprintf(progress, "%5.1f s  %s\n", time.Since(begun).Seconds(), fmt.Sprintf(format, args...))
	}}
	p.ev.addresses = map[netip.Addr]map[name]struct{}{}
	p.ev.presented = map[netip.AddrPort]presentation{}
	p.ev.outside = map[string]attempt{}
	binary, err := os.ReadFile(s.Bank)
	if err != nil {
		return nil, err
	}
	p.ev.artifact = assay.ArtifactSet{{Kind: assay.Executable, Digest: assay.DigestOf(binary)}}.Digest()

	in := wire.NewInspector(Marker)
	tap, err := wire.Open(in)
	if err != nil {
		return nil, err
	}
	defer tap.Close()
	tapping, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	tapped := make(chan error, 1)
	go func() { tapped <- tap.Run(tapping) }()

	err = p.acts(ctx)
	p.tell("ending everything")
	err = errors.Join(err, s.strike())
	p.ev.left = leftovers(p.proxyPath())
	stop()
	if err := errors.Join(err, <-tapped); err != nil {
		return nil, err
	}
	p.ev.wire = in.Report()
	return judge(&p.ev), nil
}

// acts is the play: each act adds to the evidence. An error ends it.
func (p *play) acts(ctx context.Context) error {
	for _, act := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"starting control and agent", p.actRaise},
		{"starting the bank", p.actCast},
		{"driving it", p.actDrive},
		{"listening to a server that speaks first", p.actFirst},
		{"starting a workload that proves nothing", p.actScript},
		{"knocking from outside, in clear", p.actOutside},
		{"reading every workload's certificate", p.actCertificates},
		{"killing control and agent, with new connections all the time", p.actOutage},
		{"starting them again and driving once more", p.actReturn},
		{"reading what control counted", p.actRead},
	} {
		p.tell("%s", act.title)
		if err := act.play(ctx); err != nil {
			return fmt.Errorf("%s: %w", act.title, err)
		}
	}
	return nil
}

// await asks again until done, or until a process that should live has ended.
func (p *play) await(ctx context.Context, what string, within time.Duration, done func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("%s: not after %s", what, within))
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		ok, err := done(ctx)
		if ok {
			return nil
		}
		if err != nil && status.Code(err) != codes.DeadlineExceeded { // that is ours
			last = err
		}
		select {
		case <-ctx.Done():
			if last != nil && ctx.Err() == context.DeadlineExceeded {
				return fmt.Errorf("%w: %w", context.Cause(ctx), last)
			}
			return context.Cause(ctx)
		case <-p.up.done:
			return p.up.failure()
		case <-tick.C:
		}
		if err := failed(p.members); err != nil {
			return err
		}
	}
}

// workloads asks control who is there, and remembers who lived where.
func (p *play) workloads(ctx context.Context) ([]assay.Workload, error) {
	all, err := list[assay.Workload](ctx, p.operator, "workloads")
	for _, w := range all {
		for _, a := range w.Addrs {
			if p.ev.addresses[a.Unmap()] == nil {
				p.ev.addresses[a.Unmap()] = map[name]struct{}{}
			}
			p.ev.addresses[a.Unmap()][nameOf(w.Identity)] = struct{}{}
		}
	}
	return all, err
}

func (p *play) actRaise(ctx context.Context) (err error) {
	p.ev.ready, err = p.raise(ctx)
	return err
}

// actCast starts the bank and waits until each member accepts connections.
func (p *play) actCast(ctx context.Context) error {
	begun := time.Now()
	if err := p.enterCast(); err != nil {
		return err
	}
	err := p.await(ctx, "the bank", 30*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		if err != nil {
			return false, err
		}
		p.ev.members = all
		n := ready(all)
		return n == castSize(), fmt.Errorf("%d of %d workloads accept connections", n, castSize())
	})
	for _, w := range p.ev.members {
		if !w.MeshedSince.IsZero() {
			p.ev.meshed = max(p.ev.meshed, w.MeshedSince.Sub(begun))
		}
	}
	return err
}

// drive runs the load generator as a workload.
func (p *play) drive(ctx context.Context, act string, args ...string) error {
	proc, err := p.enter("load", true, p.client(load, append([]string{"load"}, args...)...)...)
	if err != nil {
		return err
	}
	return p.driven(ctx, act, proc)
}

// driven takes the summary of a load generator. Failed requests are evidence, not an
// error: the play goes on.
func (p *play) driven(ctx context.Context, act string, proc *process) error {
	// Its address has to be known before it is gone, and control may be dead.
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !proc.ended() && ctx.Err() == nil {
		p.workloads(ctx)
		select {
		case <-ctx.Done():
		case <-proc.done:
		case <-tick.C:
		}
	}
	return p.summary(ctx, act, proc)
}

func (p *play) summary(ctx context.Context, act string, proc *process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("no summary after a minute"))
	defer cancel()
	out, err := proc.result(ctx)
	if ctx.Err() != nil {
		return err
	}
	r := loadResult{act: act, err: err}
	if bad := json.Unmarshal(out, &r.summary); bad != nil && err == nil {
		r.err = fmt.Errorf("summary %q: %w", out, bad)
	}
	p.ev.loads = append(p.ev.loads, r)
	return nil
}

func (p *play) actDrive(ctx context.Context) error {
	return p.drive(ctx, "with everything there", "--duration", "5s", "--rate", "100")
}

// actFirst measures on several fresh workloads, each with its certificate: what is
// asked is whether detection makes a first connection wait, not how long a birth is.
func (p *play) actFirst(ctx context.Context) error {
	for range probes {
		r, err := p.probe(ctx)
		if err != nil {
			return err
		}
		p.ev.first = append(p.ev.first, r)
	}
	return nil
}

const probes = 3

func (p *play) probe(ctx context.Context) (r probeResult, err error) {
	input, begin, err := os.Pipe()
	if err != nil {
		return r, err
	}
	defer begin.Close()
	proc, err := p.launch(launch{name: "probe", keep: true, input: input,
		args: p.client(probe, "probe", "--wait", "--target", "events.bank:4222", "--count", "20")})
	input.Close()
	if err != nil {
		return r, err
	}
	certified := func(ctx context.Context) (bool, error) {
		all, err := list[api.WorkloadView](ctx, p.operator, "workloads")
		for _, w := range all {
			if nameOf(w.Identity) == probe && !w.MeshedSince.IsZero() && w.Serial != "" {
				return true, nil
			}
		}
		return proc.ended(), err
	}
	if err := p.await(ctx, "the probe's certificate", 30*time.Second, certified); err != nil {
		return r, err
	}
	if _, err := p.workloads(ctx); err != nil {
		return r, err
	}
	begin.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("no answer after a minute"))
	defer cancel()
	out, err := proc.result(ctx)
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	r.err = err
	// The next one has the same name: it must not be taken for this one.
	return r, p.await(ctx, "the end of the probe", 30*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		return err == nil && !slices.ContainsFunc(all, func(w assay.Workload) bool { return nameOf(w.Identity) == probe }), err
	})
}

// actScript starts a shell, whose digest says nothing about what it does. It waits
// for a line that nobody writes.
func (p *play) actScript(ctx context.Context) error {
	fifo := filepath.Join(p.Dir, "nothing")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		return err
	}
	if _, err := p.enter("script", false, "run", "--namespace", front, "--service", "script", "--", "/bin/sh", "-c", "read line <"+fifo); err != nil {
		return err
	}
	return p.await(ctx, "the script", 10*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		for _, w := range all {
			if w.Name == "script" && len(w.Artifacts) > 0 {
				p.ev.script = w
				return true, nil
			}
		}
		return false, err
	})
}

// actOutside speaks plaintext to a workload of a strict namespace, which has to refuse
// it, and to one of an observing namespace, which shows that the way is open.
func (p *play) actOutside(ctx context.Context) error {
	p.ev.gateway = map[netip.Addr]struct{}{}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, a := range own {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			p.ev.gateway[prefix.Addr().Unmap()] = struct{}{}
		}
	}
	for _, t := range []struct {
		n     name
		speak string
	}{
		{payments, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"},
		{web, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"},
	} {
		at, err := p.address(ctx, t.n)
		if err != nil {
			return err
		}
		p.ev.outside[t.n.String()] = knock(ctx, at, t.speak)
	}
	return nil
}

// knock says something in clear and returns what comes back.
func knock(ctx context.Context, target netip.AddrPort, speak string) attempt {
	a := attempt{target: target}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", target.String())
	if err != nil {
		a.err = err
		return a
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if _, err := io.WriteString(conn, speak); err != nil {
		a.err = err
		return a
	}
	// To the end: closing with something unread would be a reset, and a failure.
	b, err := io.ReadAll(io.LimitReader(conn, 1<<20))
	n := len(b)
	a.answer = string(b[:min(n, 64)])
	switch {
	case n == 0:
		a.err = err // refused: reset, or closed without a word
	case strings.HasPrefix(a.answer, "HTTP/1.") && !strings.Contains(strings.SplitN(a.answer, "\r\n", 2)[0], fmt.Sprint(http.StatusOK)):
		a.err = fmt.Errorf("answers %q", strings.SplitN(a.answer, "\r\n", 2)[0])
	}
	return a
}

func (p *play) actCertificates(ctx context.Context) error {
	bundles, err := list[api.BundleView](ctx, p.operator, "bundle")
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	for _, b := range bundles {
		p.ev.trustDomain = b.TrustDomain
		for _, root := range b.Roots {
			if !roots.AppendCertsFromPEM([]byte(root.PEM)) {
				return fmt.Errorf("root %s: no certificate", root.ID)
			}
		}
	}
	for _, w := range p.ev.members {
		for _, port := range w.Ports {
			for _, a := range w.Addrs {
				at := netip.AddrPortFrom(a, port)
				p.ev.presented[at] = present(ctx, at, roots)
			}
		}
	}
	return nil
}

// actOutage kills control and agent without a warning while a load generator opens a
// new connection, and so looks up a name, for every request.
func (p *play) actOutage(ctx context.Context) error {
	// What control knows now is gone with it as far as it is not stored.
	if err := p.await(ctx, "the edges", 15*time.Second, func(ctx context.Context) (bool, error) {
		now, err := list[assay.Edge](ctx, p.operator, "edges")
		if err != nil {
			return false, err
		}
		p.ev.edges = now
		wrong := append(p.ev.checkWanted(), p.ev.checkObserve()...)
		return len(wrong) == 0, errors.New(some(wrong))
	}); err != nil {
		p.tell("%v", err) // the verdict says it again
	}
	p.earlier = p.ev.edges
	// Clients that ended must be gone, so that every proxy belongs to somebody.
	if err := p.await(ctx, "ended workloads to be gone", 15*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		found := proxies(p.proxyPath())
		p.ev.outage.before = found
		return err == nil && len(all) == len(found), fmt.Errorf("%d workloads, %d proxies", len(all), len(found))
	}); err != nil {
		return err
	}

	proc, err := p.enter("load-fresh", true, p.client(load, "load", "--fresh", "--duration", "6s", "--rate", "40")...)
	if err != nil {
		return err
	}
	if err := p.await(ctx, "the load generator", 15*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		there := slices.ContainsFunc(all, func(w assay.Workload) bool { return nameOf(w.Identity) == load })
		return proc.ended() || there && strings.Contains(proc.tail(), "load begins"), err
	}); err != nil {
		return err
	}
	if proc.ended() {
		return p.summary(ctx, "while control and agent were dead", proc)
	}
	p.up.cmd.Process.Kill()
	<-p.up.done
	killed := time.Now()
	err = p.driven(ctx, "while control and agent were dead", proc)
	p.ev.outage.length = time.Since(killed)
	if conn, dial := net.Dial("unix", p.ControlSocket()); dial == nil {
		conn.Close()
		p.ev.outage.started = true
	}
	return err
}

// actReturn starts control and agent again: they have to take over every proxy.
func (p *play) actReturn(ctx context.Context) error {
	if _, err := p.raise(ctx); err != nil {
		return err
	}
	if err := p.await(ctx, "the bank after the return", 20*time.Second, func(ctx context.Context) (bool, error) {
		all, err := p.workloads(ctx)
		if err != nil {
			return false, err
		}
		now := map[string]bool{}
		for _, w := range all {
			now[w.ID] = !w.MeshedSince.IsZero()
		}
		for _, w := range p.ev.members {
			if !now[w.ID] {
				return false, fmt.Errorf("%s is missing", w.ID)
			}
		}
		return true, nil
	}); err != nil {
		p.ev.outage.err = err
	}
	p.ev.outage.after = proxies(p.proxyPath())
	return p.drive(ctx, "after their return", "--duration", "3s", "--rate", "100")
}

// actRead takes what control tells at the end, besides what it told before.
func (p *play) actRead(ctx context.Context) error {
	if err := p.await(ctx, "the edges", 15*time.Second, func(ctx context.Context) (bool, error) {
		now, err := list[assay.Edge](ctx, p.operator, "edges")
		if err != nil {
			return false, err
		}
		p.ev.edges = append(now, p.earlier...)
		wrong := p.ev.checkWanted()
		return len(wrong) == 0, errors.New(some(wrong))
	}); err != nil {
		p.tell("%v", err)
	}
	var err error
	p.ev.findings, err = list[assay.Finding](ctx, p.operator, "findings")
	return err
}

func (p *play) proxyPath() string {
	if p.Proxy != "" {
		return p.Proxy
	}
	return filepath.Join(filepath.Dir(p.Assay), "assay-proxy")
}

// proxies finds the data plane's processes, by pid with their start time.
func proxies(path string) map[int]string {
	found := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is valid
	for _, dir := range dirs {
		exe, err := os.Readlink(dir + "/exe")
		if err != nil || strings.TrimSuffix(exe, " (deleted)") != path {
			continue
		}
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		var pid int
		fmt.Sscan(filepath.Base(dir), &pid)
		// proc(5): the command is in parentheses and may hold anything; starttime is
		// the 22nd field, the 20th after it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) > 19 && fields[0] != "Z" {
			found[pid] = fields[19]
		}
	}
	return found
}

// leftovers is what should be gone after the end.
func leftovers(proxy string) (left []string) {
	links, err := net.Interfaces()
	if err != nil {
		left = append(left, err.Error())
	}
	for _, l := range links {
		if l.Flags&net.FlagLoopback == 0 {
			left = append(left, "link "+l.Name)
		}
	}
	for pid := range proxies(proxy) {
		left = append(left, fmt.Sprintf("proxy %d", pid))
	}
	return left
}
