package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"assay.dev/api"
	"assay.dev/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// shifted is a clock that can be set forward, for control and hosts alike.
type shifted struct{ by atomic.Int64 }

func (s *shifted) now() time.Time          { return time.Now().Add(time.Duration(s.by.Load())) }
func (s *shifted) advance(d time.Duration) { s.by.Add(int64(d)) }

// realControl is control as `assay control` runs it, on a real port.
type realControl struct {
	address string
	stop    func()
	token   func() string
	remove  func(host string)
}

func startControl(t *testing.T, dir, listen string, clock *shifted, log io.Writer) *realControl {
	t.Helper()
	c, err := control.Open(t.Context(), control.Config{Data: dir, TrustDomain: "bank.test", Now: clock.now, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	remote, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "control.sock")
	local, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, f := range []func() error{
		func() error { return c.Run(ctx) },
		func() error { return c.ServeRemote(ctx, remote) },
		func() error { return c.ServeOperators(ctx, local) },
	} {
		running.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
	}
	r := &realControl{address: remote.Addr().String()}
	r.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	operate := func(do func(api.OperatorClient)) {
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		do(api.NewOperatorClient(conn))
	}
	r.remove = func(host string) {
		operate(func(o api.OperatorClient) {
			if _, err := o.Delete(t.Context(), &api.DeleteRequest{Kind: "host", Name: host}); err != nil {
				t.Fatal(err)
			}
		})
	}
	r.token = func() (token string) {
		operate(func(o api.OperatorClient) {
			resp, err := o.CreateToken(t.Context(), &api.CreateTokenRequest{Covers: []string{"*/*"}, TtlSeconds: 3600})
			if err != nil {
				t.Fatal(err)
			}
			token = resp.GetToken()
		})
		return token
	}
	return r
}

// TestHostRenewsForAMonth: a host's certificate lives for a week, and so does what
// depends on it. For a month of a clock that is set forward one and a half days at a time,
// the certificate that the host shows is never one that has ended, every stream begins
// again at once, and neither control's absence nor a restart of the agent matters.
func TestHostRenewsForAMonth(t *testing.T) {
	clock, log := &shifted{}, logs(t)
	data, dir := filepath.Join(t.TempDir(), "control"), t.TempDir()
	c := startControl(t, data, "127.0.0.1:0", clock, log)
	cfg := RemoteConfig{Address: c.address, DataDir: dir, HostName: "node", Token: c.token(), Now: clock.now, Log: slog.New(slog.NewTextHandler(log, nil))}
	connect := func() (r *Remote, stop func()) {
		r, err := Connect(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		r.look = 5 * time.Millisecond
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { r.Run(ctx) })
		stop = sync.OnceFunc(func() { cancel(); running.Wait(); r.Close() })
		t.Cleanup(stop)
		return r, stop
	}
	r, stop := connect()
	host := r.host.HostID
	// sync begins a stream, as the agent does, and returns when control has welcomed it.
	sync := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		stream, err := r.Sync(ctx)
		if err == nil {
			err = stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{}}})
		}
		if err != nil {
			return err
		}
		u, err := stream.Recv()
		if err == nil && u.GetWelcome().GetHostId() != host {
			err = fmt.Errorf("welcomed as %q", u.GetWelcome().GetHostId())
		}
		return err
	}
	serials := map[string]bool{}
	seen := func() (left time.Duration) {
		r.mu.Lock()
		defer r.mu.Unlock()
		leaf := r.cert.Leaf
		serials[leaf.SerialNumber.String()] = true
		return leaf.NotAfter.Sub(clock.now())
	}
	const day = 24 * time.Hour
	for step := range 20 {
		clock.advance(3 * day / 2)
		// It is renewed by the time that is six tenths of its life.
		lab.Eventually(t, "the certificate is renewed in time", func() bool { return seen() > 5*day/2 })
		switch step {
		case 5: // the agent restarts, with the spent token
			stop()
			r, stop = connect()
		case 10: // control is away when a renewal is due
			c.stop()
			for r.untilRenewal() > 0 {
				clock.advance(day / 2)
			}
			lab.Eventually(t, "a renewal is tried", func() bool { return strings.Contains(log.(*logBuffer).String(), "was not renewed") })
			c = startControl(t, data, c.address, clock, log)
			lab.Eventually(t, "the certificate is renewed when control is back", func() bool { return seen() > 5*day/2 })
		}
		var last error
		for deadline := time.Now().Add(10 * time.Second); ; {
			if last = sync(); last == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("after %d steps no stream begins: %v", step, last)
			}
		}
	}
	if n := len(serials); n < 6 || n > 14 {
		t.Errorf("%d certificates in 34 days", n)
	}
	if st, err := os.Stat(r.file()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}

	// A host that was off for longer than its certificate lives is told what to do.
	stop()
	clock.advance(9 * day)
	r, stop = connect()
	lab.Eventually(t, "the log has a remedy", func() bool { return strings.Contains(log.(*logBuffer).String(), "join with a new token") })
	if err := sync(); err == nil {
		t.Error("a stream with a certificate that has ended")
	}
	stop()
	if err := os.Remove(r.file()); err != nil {
		t.Fatal(err)
	}
	cfg.Token = c.token()
	lab.Eventually(t, "the host joins again", func() bool { // when control has a new certificate, too
		var err error
		r, err = Connect(t.Context(), cfg)
		return err == nil
	})
	defer r.Close()
	if host = r.host.HostID; sync() != nil {
		t.Error("the host that joined again has no stream")
	}
}
