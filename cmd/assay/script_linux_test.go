package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/control"
	"assay.dev/kube"
)

var update = flag.Bool("update", false, "write what is into the scripts, instead of comparing")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"assay": main, "kubectl-assay": main})
}

// TestScripts drives the real command against a real control, one for each script.
// The clock of that control stands still at 2026-01-02 12:00 UTC, but in the script
// reach, where certificates are checked against the real one. Besides
// testscript's own commands there are:
//
//	host FILE      become a host with the workloads, reports and findings in FILE
//	serial NAME    put the serial number of keys/NAME.crt into $SERIAL
//	await REGEXP COMMAND…  again and again until it says so
//	clock DURATION let control's clock go on
//	code N COMMAND run a command that must end with exit code N
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			r, err := startControl(filepath.Join(env.WorkDir, ".control"), &clock{runs: strings.Contains(env.WorkDir, "script-reach")})
			if err != nil {
				return err
			}
			env.Defer(func() {
				if err := r.stop(); err != nil {
					t.Error(err)
				}
			})
			env.Values[controlKey{}] = r
			env.Setenv("CONTROL", r.socket)
			env.Setenv("REMOTE", r.remote)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serial": func(ts *testscript.TestScript, neg bool, args []string) {
				block, _ := pem.Decode([]byte(ts.ReadFile("keys/" + args[0] + ".crt")))
				cert, err := x509.ParseCertificate(block.Bytes)
				ts.Check(err)
				ts.Setenv("SERIAL", fmt.Sprintf("%032x", cert.SerialNumber))
			},
			"await": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: await REGEXP COMMAND…")
				}
				want := regexp.MustCompile(args[0])
				for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
					err := ts.Exec(args[1], args[2:]...)
					if err == nil && want.MatchString(ts.ReadFile("stdout")) {
						return
					}
					if time.Now().After(deadline) {
						ts.Fatalf("%s never says %s: %v\n%s", args[1:], want, err, ts.ReadFile("stdout"))
					}
				}
			},
			"host": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 1 {
					ts.Fatalf("usage: host FILE")
				}
				ts.Check(ts.Value(controlKey{}).(*runningControl).host([]byte(ts.ReadFile(args[0]))))
			},
			"code": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: code NUMBER COMMAND …")
				}
				got := 0
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					failed, ok := errors.AsType[*exec.ExitError](err)
					if !ok {
						ts.Check(err)
					}
					got = failed.ExitCode()
				}
				if strconv.Itoa(got) != args[0] {
					ts.Fatalf("exit code %d", got)
				}
			},
			"clock": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 1 {
					ts.Fatalf("usage: clock DURATION")
				}
				d, err := time.ParseDuration(args[0])
				ts.Check(err)
				ts.Value(controlKey{}).(*runningControl).clock.ahead.Add(int64(d))
			},
		},
	})
}

type controlKey struct{}

// clock stands still until it is moved, unless it runs.
type clock struct {
	ahead atomic.Int64
	runs  bool
}

func (c *clock) now() time.Time {
	if c.runs {
		return time.Now().Add(time.Duration(c.ahead.Load()))
	}
	return time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC).Add(time.Duration(c.ahead.Load()))
}

// runningControl is a control with its sockets, and the stream of its own host.
type runningControl struct {
	*control.Control
	clock          *clock
	socket, remote string
	cancel         context.CancelFunc
	done           sync.WaitGroup
	failed         error
	mu             sync.Mutex
	stream         api.Hosts_SyncClient
	hosts          api.HostsClient
	ctx            context.Context
}

func startControl(dir string, c *clock) (*runningControl, error) {
	ctx, cancel := context.WithCancel(context.Background())
	ctl, err := control.Open(ctx, control.Config{Data: dir, TrustDomain: "bank.test", Translate: kube.Translate, Now: c.now})
	if err != nil {
		cancel()
		return nil, err
	}
	r := &runningControl{Control: ctl, clock: c, socket: filepath.Join(dir, "control.sock"), cancel: cancel, ctx: ctx}
	local, err := net.Listen("unix", r.socket)
	if err != nil {
		return nil, errors.Join(err, r.stop())
	}
	remote, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, local.Close(), r.stop())
	}
	r.remote = remote.Addr().String()
	for _, f := range []func(context.Context) error{
		ctl.Run,
		func(ctx context.Context) error { return ctl.ServeOperators(ctx, local) },
		func(ctx context.Context) error { return ctl.ServeRemote(ctx, remote) },
	} {
		r.done.Go(func() {
			if err := f(ctx); err != nil {
				r.mu.Lock()
				r.failed = errors.Join(r.failed, err)
				r.mu.Unlock()
			}
		})
	}
	return r, nil
}

func (r *runningControl) stop() error {
	r.cancel()
	r.done.Wait()
	return errors.Join(r.failed, r.Close())
}

// facts is what a host reports.
type facts struct {
	Workloads []assay.Workload
	Reports   []struct {
		Workload string
		Started  time.Time
		Counted  time.Time
		Signals  []assay.Signals
		Balance  *assay.Balance
		assay.Counters
	}
	Findings []assay.Finding
}

// host reports facts as the host in control's own process, and waits until they
// are known.
func (r *runningControl) host(text []byte) error {
	var f facts
	if err := json.Unmarshal(text, &f); err != nil {
		return err
	}
	if r.stream == nil {
		var err error
		if r.hosts, err = r.LocalHost(r.ctx); err != nil {
			return err
		}
		if r.stream, err = r.hosts.Sync(r.ctx); err != nil {
			return err
		}
		if err := r.stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{Build: "test", HostName: "node"}}}); err != nil {
			return err
		}
		r.done.Go(func() {
			for {
				u, err := r.stream.Recv()
				if err != nil {
					return
				}
				if no := u.GetRefused(); no != nil {
					r.mu.Lock()
					r.failed = errors.Join(r.failed, errors.New(no.GetWorkloadId()+" was refused: "+no.GetReason()))
					r.mu.Unlock()
				}
			}
		})
	}
	for _, w := range f.Workloads {
		if err := r.stream.Send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: api.FromWorkload(&w)}}); err != nil {
			return err
		}
		// One after the other, so that addresses are given in the order of the file.
		if err := r.awaitService(w.Namespace, w.Service); err != nil {
			return err
		}
	}
	for _, rep := range f.Reports {
		m := api.FromReport(&api.Report{Workload: rep.Workload, Started: rep.Started, Counted: rep.Counted, Signals: rep.Signals, Counters: rep.Counters, Balance: rep.Balance})
		if err := r.stream.Send(api.ReportUpdate(m)); err != nil {
			return err
		}
	}
	for _, finding := range f.Findings {
		if err := r.stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&finding)}}); err != nil {
			return err
		}
	}
	if err := r.await(&f); err != nil {
		return err
	}
	for _, w := range f.Workloads {
		if err := r.certify(&w); err != nil {
			return err
		}
		ack := &api.BundleAck{WorkloadId: w.ID, Version: 1}
		if err := r.stream.Send(&api.HostUpdate{Update: &api.HostUpdate_BundleAck{BundleAck: ack}}); err != nil {
			return err
		}
	}
	return r.awaitAcks(len(f.Workloads))
}

// await waits until control lists what was reported.
func (r *runningControl) await(f *facts) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		var missing []string
		for kind, names := range map[string][]string{"workloads": nil, "signals": nil, "findings": nil} {
			resp, err := r.List(r.ctx, &api.ListRequest{Kind: kind})
			if err != nil {
				return err
			}
			switch all := string(bytes.Join(resp.GetItems(), []byte("\n"))); kind {
			case "workloads":
				for _, w := range f.Workloads {
					names = append(names, `"id":"`+w.ID+`"`)
				}
				missing = append(missing, notIn(all, names)...)
			case "signals":
				for _, rep := range f.Reports {
					for _, s := range rep.Signals {
						text, err := json.Marshal(s)
						if err != nil {
							return err
						}
						names = append(names, string(text))
					}
				}
				missing = append(missing, notIn(all, names)...)
			case "findings":
				for _, finding := range f.Findings {
					names = append(names, `"detail":"`+finding.Detail+`"`)
				}
				missing = append(missing, notIn(all, names)...)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		if time.Now().After(deadline) || !sleep(r.ctx, 5*time.Millisecond) {
			return errors.New("control does not list " + strings.Join(missing, ", "))
		}
	}
}

// awaitService waits until a service has its addresses.
func (r *runningControl) awaitService(namespace, name string) error {
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, err := r.List(r.ctx, &api.ListRequest{Kind: "services", Namespace: namespace, Name: name})
		if err != nil {
			return err
		}
		if strings.Contains(string(bytes.Join(resp.GetItems(), nil)), `"vips":[`) {
			return nil
		}
		if time.Now().After(deadline) || !sleep(r.ctx, 5*time.Millisecond) {
			return fmt.Errorf("%s/%s gets no address", namespace, name)
		}
	}
}

// awaitAcks waits until so many workloads trust the first bundle.
func (r *runningControl) awaitAcks(n int) error {
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, err := r.List(r.ctx, &api.ListRequest{Kind: "workloads"})
		if err != nil {
			return err
		}
		if strings.Count(string(bytes.Join(resp.GetItems(), nil)), `"bundle":1`) >= n {
			return nil
		}
		if time.Now().After(deadline) || !sleep(r.ctx, 5*time.Millisecond) {
			return errors.New("control does not list what bundles are trusted")
		}
	}
}

func notIn(all string, names []string) (missing []string) {
	for _, n := range names {
		if !strings.Contains(all, n) {
			missing = append(missing, n)
		}
	}
	return missing
}

// certify has control sign a certificate for a workload.
func (r *runningControl) certify(w *assay.Workload) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	resp, err := r.hosts.Issue(r.ctx, &api.IssueRequest{WorkloadId: w.ID, Csr: csr, Artifacts: api.FromArtifacts(w.Artifacts)})
	if err == nil && resp.GetRefused() != "" {
		err = errors.New(resp.GetRefused())
	}
	return err
}

// TestStatOverTime measures rates of numbers that grow while it looks.
func TestStatOverTime(t *testing.T) {
	r, err := startControl(filepath.Join(t.TempDir(), "c"), &clock{runs: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	}()
	text, err := os.ReadFile("testdata/stat-over-time.json")
	if err != nil {
		t.Fatal(err)
	}
	// The proxy answers a thousand requests a second.
	began := time.Now().UTC().Truncate(time.Microsecond)
	report := func() error {
		var f facts
		if err := json.Unmarshal(text, &f); err != nil {
			return err
		}
		if r.stream != nil {
			f.Workloads = nil
		}
		now := time.Now().UTC().Truncate(time.Microsecond) // as it crosses the wire
		n := uint64(now.Sub(began).Milliseconds())
		s := &f.Reports[0].Signals[0]
		f.Reports[0].Started, f.Reports[0].Counted = began, now
		s.Requests, s.FirstSeen, s.LastSeen, s.Latency.Buckets[20] = n, began, now, n
		b, err := json.Marshal(f)
		if err != nil {
			return err
		}
		return r.host(b)
	}
	if err := report(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var reporter sync.WaitGroup
	reporter.Go(func() {
		for sleep(ctx, 50*time.Millisecond) {
			if err := report(); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	defer reporter.Wait()
	defer cancel()

	out := command(t, ctx, "stat", "--control", r.socket, "--interval", "400ms")
	fields := strings.Fields(strings.Split(out, "\n")[1])
	var rps float64
	// However late a report arrives, it says when it was counted.
	if err := json.Unmarshal([]byte(fields[3]), &rps); err != nil || fields[0] != "bank/payments" || rps < 950 || rps > 1050 {
		t.Errorf("want about 1000 requests per second to bank/payments:\n%s", out)
	}
	out = command(t, ctx, "edges", "--control", r.socket, "--interval", "400ms")
	if !strings.Contains(out, "bank/payments:9000") || strings.Contains(out, " 0 ") {
		t.Errorf("edges:\n%s", out)
	}

	// Watching goes on until it is interrupted, which is no error.
	for _, name := range []string{"stat", "edges"} {
		watching, interrupt := context.WithCancel(ctx)
		tables := &counter{enough: 3, then: interrupt}
		var errs bytes.Buffer
		if code := run(watching, []string{name, "--watch", "--control", r.socket, "--interval", "100ms"}, strings.NewReader(""), tables, &errs); code != 0 || tables.n < 3 {
			t.Errorf("%s --watch: exit code %d after %d tables: %s", name, code, tables.n, errs.String())
		}
		interrupt()
	}
}

func command(t *testing.T, ctx context.Context, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if code := run(ctx, args, strings.NewReader(""), &out, &errs); code != 0 {
		t.Fatalf("assay %v: exit code %d\n%s", args, code, errs.String())
	}
	return out.String()
}

// counter counts writes, each of which is one table.
type counter struct {
	n, enough int
	then      func()
}

func (c *counter) Write(p []byte) (int, error) {
	if c.n++; c.n == c.enough {
		c.then()
	}
	return len(p), nil
}
