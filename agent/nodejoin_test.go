package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"assay.dev/api"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// rootsOf is what control publishes, asked of it by a host that joins.
func rootsOf(t *testing.T, c *realControl, clock *shifted) []*x509.Certificate {
	t.Helper()
	r, err := Connect(t.Context(), RemoteConfig{Address: c.address, DataDir: t.TempDir(), HostName: "witness", Token: c.token(), Now: clock.now})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	roots, err := api.FromBundle(1, r.host.Roots).Certificates()
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

// TestNodeJoin: the agent of a node begins without control, joins when it can, and joins
// anew when its certificate has ended or is of another authority.
func TestNodeJoin(t *testing.T) {
	clock, log := &shifted{}, logs(t)
	c := startControl(t, filepath.Join(t.TempDir(), "control"), "127.0.0.1:0", clock, io.Discard)
	other := startControl(t, filepath.Join(t.TempDir(), "other"), "127.0.0.1:0", clock, io.Discard)
	theirs := rootsOf(t, other, clock)

	var mu sync.Mutex
	var roots []*x509.Certificate
	issuer := c
	var tokens atomic.Int64
	set := func(list []*x509.Certificate, by *realControl) {
		mu.Lock()
		defer mu.Unlock()
		roots, issuer = list, by
	}
	cfg := RemoteConfig{
		Address: c.address, DataDir: t.TempDir(), HostName: "node-1", Now: clock.now, Log: slog.New(slog.NewTextHandler(log, nil)),
		Node: &NodeJoin{
			Token: func() (string, error) {
				tokens.Add(1)
				mu.Lock()
				defer mu.Unlock()
				return issuer.token(), nil
			},
			Roots: func(context.Context) ([]*x509.Certificate, error) {
				mu.Lock()
				defer mu.Unlock()
				if roots == nil {
					return nil, errors.New("control has not published its roots")
				}
				return roots, nil
			},
		},
	}
	var r *Remote
	start := func() (stop func()) {
		t.Helper()
		var err error
		if r, err = Connect(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		r.look = 5 * time.Millisecond
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { r.Run(ctx) })
		stop = sync.OnceFunc(func() { cancel(); running.Wait(); r.Close() })
		t.Cleanup(stop)
		return stop
	}
	welcomed := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		stream, err := r.Sync(ctx)
		if err == nil {
			err = stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{}}})
		}
		if err != nil {
			return false
		}
		u, err := stream.Recv()
		return err == nil && u.GetWelcome().GetHostId() != ""
	}
	certificate := func() *tls.Certificate {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.cert
	}
	// anew waits for another certificate than the one before, and for control to take it.
	anew := func(what string, before *tls.Certificate) {
		t.Helper()
		lab.Eventually(t, what, func() bool {
			now := certificate()
			return welcomed() && now != before // control has to be asked to say that it does not
		})
	}
	says := func(what string) {
		t.Helper()
		lab.Eventually(t, "the log says "+what, func() bool { return strings.Contains(log.(*logBuffer).String(), what) })
	}

	stop := start()
	if _, err := r.Sync(t.Context()); status.Code(err) != codes.Unavailable {
		t.Errorf("before it has joined: %v", err)
	}
	says("has not published its roots")
	set(theirs, c) // somebody else's: the token must not reach this control
	says("control's certificate")
	set(rootsOf(t, c, clock), c)
	lab.Eventually(t, "the node has joined", welcomed)

	stop()
	was := tokens.Load()
	stop = start()
	lab.Eventually(t, "the next agent is the same host", welcomed)
	if now := tokens.Load(); now != was {
		t.Errorf("it has used %d tokens to begin again", now-was)
	}

	before := certificate()
	clock.advance(9 * 24 * time.Hour)
	anew("it joins anew when its certificate has ended", before)
	if tokens.Load() == was {
		t.Error("without a token")
	}

	was = tokens.Load()
	r.mu.Lock()
	before, removed := r.cert, r.host.HostID
	r.mu.Unlock()
	c.remove(removed)
	anew("it joins again when its host was removed", before)
	if tokens.Load() == was {
		t.Error("without a token")
	}

	stop()
	set(theirs, other)
	cfg.Address = other.address
	was = tokens.Load()
	stop = start()
	lab.Eventually(t, "it joins another authority", welcomed)
	if tokens.Load() == was {
		t.Error("without a token")
	}
	stop()
}
