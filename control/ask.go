package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// What controls on one store ask each other: whether they reach it, and what people want to
// see that is in nobody's store.

// asking bounds what another control may take to answer.
const asking = 2 * time.Second

// Status tells another control whether this one reaches the store.
func (c *Control) Status(context.Context, *api.StatusRequest) (*api.StatusResponse, error) {
	s := c.several
	if s == nil {
		return nil, &assay.Error{Kind: assay.Conflict, Op: "status", Err: errors.New("this control is the only one on its store")}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &api.StatusResponse{Store: time.Since(s.beaten) < c.cfg.takeover/2, Revision: s.revision}, nil
}

// Numbers tells another control the latest reports of the hosts whose streams are here.
func (c *Control) Numbers(_ *api.NumbersRequest, stream grpc.ServerStreamingServer[api.Number]) error {
	for _, n := range c.model.ownNumbers() {
		if err := stream.Send(n); err != nil {
			return err
		}
	}
	return nil
}

// ownNumbers returns the reports of workloads whose hosts have their stream here.
func (m *model) ownNumbers() []*api.Number {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*api.Number
	for _, r := range m.reports {
		if h := m.hosts[r.workload.Host]; r.gone.IsZero() && h != nil && h.session != nil {
			out = append(out, &api.Number{Report: r.encoded, Received: api.FromTime(r.received)})
		}
	}
	return out
}

// each calls ask for others that can be reached, all at once.
func (c *Control) each(ctx context.Context, which others, ask func(context.Context, string, *grpc.ClientConn) error) {
	var all sync.WaitGroup
	for id, conn := range c.reach(which) {
		all.Go(func() {
			if err := ask(ctx, id, conn); err != nil && ctx.Err() == nil {
				c.log.Warn("another control does not answer", "control", id, "err", err)
			}
		})
	}
	all.Wait()
}

// others says which of them are asked.
type others bool

const (
	alive  others = false // those that showed life not long ago
	listed others = true  // whether this control can see that they live, or not
)

// reach returns connections to the others.
func (c *Control) reach(which others) map[string]*grpc.ClientConn {
	s := c.several
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*grpc.ClientConn{}
	for id, o := range s.others {
		if o.Address == "" || which == alive && time.Since(o.grew) >= 2*c.cfg.takeover {
			continue
		}
		if o.conn == nil {
			conn, err := grpc.NewClient("passthrough:"+o.Address, grpc.WithTransportCredentials(credentials.NewTLS(api.ClientTLS(api.Credentials{
				TrustDomain: c.authority.TrustDomain(),
				Roots:       func() *x509.CertPool { return c.authority.Pool() },
				Certificate: func() (*tls.Certificate, error) { return c.certificate.Load(), nil },
				Now:         c.now,
			}))), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
			if err != nil {
				c.log.Error("another control has no address", "control", id, "address", o.Address, "err", err)
				continue
			}
			o.conn = conn
		}
		out[id] = o.conn
	}
	return out
}

// othersReachStore asks whether any does. Who asks cannot see who lives: that is in the store.
func (c *Control) othersReachStore(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, asking)
	defer cancel()
	var mu sync.Mutex
	any := false
	c.each(ctx, listed, func(ctx context.Context, _ string, conn *grpc.ClientConn) error {
		r, err := api.NewReplicasClient(conn).Status(ctx, &api.StatusRequest{})
		mu.Lock()
		defer mu.Unlock()
		any = any || err == nil && r.GetStore()
		return nil // that some have ended is to be expected
	})
	return any
}

// gather asks the others for the numbers of their hosts, for what is shown next.
func (c *Control) gather(ctx context.Context) {
	if c.several == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, asking)
	defer cancel()
	var mu sync.Mutex
	theirs := map[string]*report{}
	c.each(ctx, alive, func(ctx context.Context, _ string, conn *grpc.ClientConn) error {
		stream, err := api.NewReplicasClient(conn).Numbers(ctx, &api.NumbersRequest{})
		for err == nil {
			var n *api.Number
			if n, err = stream.Recv(); err != nil {
				break
			}
			var received time.Time
			if received, err = api.Time(n.GetReceived()); err == nil {
				mu.Lock()
				theirs[api.ReportOf(n.GetReport())] = &report{encoded: n.GetReport(), received: received}
				mu.Unlock()
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, r := range theirs {
		w, ok := m.catalog.Workload(id)
		if !ok {
			continue
		}
		if h := m.hosts[w.Host]; h != nil && h.elsewhere() {
			r.workload = w
			m.reports[id] = r
		}
	}
}

// tapElsewhere opens a tap at every other control, for the hosts that have their stream there,
// until ctx ends.
func (c *Control) tapElsewhere(ctx context.Context, watch []byte, t *openTap) {
	c.each(ctx, alive, func(ctx context.Context, _ string, conn *grpc.ClientConn) error {
		stream, err := api.NewOperatorClient(conn).Tap(ctx, &api.TapRequest{Watch: watch})
		if err != nil {
			return err
		}
		for {
			e, err := stream.Recv()
			if err != nil {
				return err
			}
			c.model.tapped(t, e)
		}
	})
}

// tapped takes in what another control's hosts saw.
func (m *model) tapped(t *openTap, e *api.TapEvent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t.dropped += e.GetDropped()
	if e.GetRecord() == nil {
		return
	}
	select {
	case t.records <- e.GetRecord():
	default:
		t.dropped++
	}
}

// checkOthers is about the other controls.
func (c *Control) checkOthers() []assay.Finding {
	s := c.several
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []assay.Finding
	for id, o := range s.others {
		if o.Beat == 0 {
			continue // it is not listed
		}
		switch still := time.Since(o.grew); {
		case still >= c.cfg.takeover:
			out = append(out, assay.Finding{Kind: "control-away", Subject: id, Detail: fmt.Sprintf("it has shown no life for %s; its hosts go to others", still.Round(time.Second)),
				Remedy: "see whether it runs; one that has ended is forgotten after a while"})
		case o.Address == "":
			out = append(out, assay.Finding{Kind: "control-not-reached", Subject: id, Detail: "it says nowhere it can be reached: numbers of its hosts are not shown here",
				Remedy: "start it with --advertise HOST:PORT"})
		}
	}
	return out
}
