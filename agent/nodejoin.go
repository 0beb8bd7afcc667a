package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	mathrand "math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// NodeJoin is how a node of a cluster shows who it is, as often as it must: its agent
// need not wait for control to begin, and joins anew when control's authority is another
// one or the host's certificate has ended.
type NodeJoin struct {
	// Token returns a token of the agent's service account. It lives for an hour or so.
	Token func() (string, error)
	// Roots returns those that control is known by.
	Roots func(ctx context.Context) ([]*x509.Certificate, error)
}

// joinNode joins unless the host has a certificate that control still takes. It tries
// until it has one, or ctx ends.
func (r *Remote) joinNode(ctx context.Context) error {
	said := ""
	for retry := time.Second; ; retry = min(2*retry, 15*time.Second) {
		joined, err := r.joinIfNeeded(ctx)
		if joined && err == nil {
			return nil
		}
		if err != nil && err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			r.cfg.Log.Error("this node has not joined the mesh; its pods wait", "err", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(retry/2 + mathrand.N(retry)):
		}
	}
}

func (r *Remote) joinIfNeeded(ctx context.Context) (bool, error) {
	if r.conn.Load() != nil && r.cfg.Now().Before(r.notAfter()) {
		roots, err := r.cfg.Node.Roots(ctx)
		if err != nil || r.knows(roots) {
			// What it has is good, as far as can be known; control decides.
			return true, nil
		}
		r.cfg.Log.Warn("control has another authority than the one this host's certificate is of; it joins anew")
	}
	if err := r.join(ctx); err != nil {
		return false, err
	}
	return true, r.redial()
}

// knows reports whether this host trusts one of the roots already.
func (r *Remote) knows(roots []*x509.Certificate) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, have := range r.host.Roots {
		for _, c := range roots {
			if bytes.Equal(have, c.Raw) {
				return true
			}
		}
	}
	return false
}

// rejoinEvery is the least time between two joins of a host that has a certificate: each costs
// the API server a question.
const rejoinEvery = 5 * time.Second

// joinAnew joins though there is a certificate: control has said that it is of no host of
// its, or neither takes the other's. It tries until that is done, or ctx ends.
func (r *Remote) joinAnew(ctx context.Context) error {
	r.cfg.Log.Warn("control does not take this node for one of its hosts; it joins anew")
	said := ""
	for retry := rejoinEvery; ; retry = min(2*retry, time.Minute) {
		err := r.join(ctx)
		if err == nil {
			err = r.redial()
		}
		if err != nil && err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			r.cfg.Log.Error("this node has not joined the mesh again; what runs goes on", "err", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(retry/2 + mathrand.N(retry/2)):
		}
		if err == nil {
			return nil
		}
	}
}

// observers look at how the calls of a node's connection end.
func (r *Remote) observers(number uint64) []grpc.DialOption {
	if r.cfg.Node == nil {
		return nil
	}
	return []grpc.DialOption{
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, in, out any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			err := call(ctx, method, in, out, conn, opts...)
			r.observe(number, err)
			return err
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := open(ctx, desc, conn, method, opts...)
			r.observe(number, err)
			if err != nil {
				return nil, err
			}
			return &observed{s, r, number}, nil
		}),
	}
}

// observed is a stream whose end is looked at.
type observed struct {
	grpc.ClientStream
	r      *Remote
	number uint64 // of its connection
}

func (s *observed) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	s.r.observe(s.number, err)
	return err
}

// observe doubts whether this host is one of control's. A host that was removed is denied
// every call; one whose certificate was taken back, or who speaks with a control of another
// authority, does not get through the handshake. One whose certificate has ended is denied, too,
// and Run knows that by itself.
func (r *Remote) observe(number uint64, err error) {
	st, ok := status.FromError(err)
	if err == nil || !ok || number != r.dialed.Load() || !r.cfg.Now().Before(r.notAfter()) {
		return
	}
	handshake := strings.Contains(st.Message(), "tls: ") || strings.Contains(st.Message(), "authentication handshake failed")
	if st.Code() != codes.PermissionDenied && !(st.Code() == codes.Unavailable && handshake) {
		return
	}
	select {
	case r.doubts <- struct{}{}:
	default:
	}
}
