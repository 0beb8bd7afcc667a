package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// role is what a caller is.
type role string

const (
	anonymous role = "anonymous" // no certificate; Join checks a token
	hostRole  role = "host"
	viewer    role = "viewer"
	operator  role = "operator"
	replica   role = "control" // another one on the store
)

// rule says who may call a method.
type rule struct {
	roles   []role
	audited bool // it changes something: who, what, when and the outcome are recorded
}

// access is the whole table. A method without a line is denied, and a test
// compares the table with the services' descriptors.
var access = map[string]rule{
	api.Hosts_Join_FullMethodName:  {roles: []role{anonymous, hostRole}, audited: true},
	api.Hosts_Renew_FullMethodName: {roles: []role{hostRole}},
	api.Hosts_Sync_FullMethodName:  {roles: []role{hostRole}},
	// Certificates are recorded in the inventory, each one.
	api.Hosts_Issue_FullMethodName: {roles: []role{hostRole}},

	api.Operator_List_FullMethodName:          {roles: []role{viewer, operator}},
	api.Operator_Check_FullMethodName:         {roles: []role{viewer, operator}},
	api.Operator_Apply_FullMethodName:         {roles: []role{operator}, audited: true},
	api.Operator_Delete_FullMethodName:        {roles: []role{operator}, audited: true},
	api.Operator_CreateToken_FullMethodName:   {roles: []role{operator}, audited: true},
	api.Operator_IssueOperator_FullMethodName: {roles: []role{operator}, audited: true},
	api.Operator_Rotate_FullMethodName:        {roles: []role{operator}, audited: true},
	api.Operator_Tap_FullMethodName:           {roles: []role{replica, operator}, audited: true}, // it shows what people do

	api.Replicas_Status_FullMethodName:  {roles: []role{replica}},
	api.Replicas_Numbers_FullMethodName: {roles: []role{replica}},
}

// caller is who calls, as the transport proved it. It is the AuthInfo of every
// connection to control.
type caller struct {
	role    role
	name    string    // a host's ID, an operator's name
	who     string    // for the audit trail
	expires time.Time // of the certificate; zero: never
	serial  string    // of the certificate
	begins  time.Time // of the certificate
}

func (caller) AuthType() string { return "assay" }

type callerKey struct{}

// callerOf returns who calls; admitCall has put it there.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(*call)
	if c == nil {
		return caller{role: anonymous}
	}
	return c.caller
}

// call is one call under way.
type call struct {
	caller
	method   string
	subject  string // what it is about
	recorded bool   // together with the change itself
	again    bool   // it has changed nothing that is worth a line
}

func callOf(ctx context.Context) *call {
	if c, _ := ctx.Value(callerKey{}).(*call); c != nil {
		return c
	}
	return &call{}
}

// admitCall decides whether a call may go on.
func (c *Control) admitCall(ctx context.Context, method string) (context.Context, *call, error) {
	k := &call{caller: caller{role: anonymous, who: "somebody without a certificate"}, method: method}
	if p, ok := peer.FromContext(ctx); ok {
		if who, ok := callerOfTransport(p); ok {
			k.caller = who
		}
	}
	name := method[strings.LastIndexByte(method, '/')+1:]
	deny := func(cause error, remedy string) error {
		return &assay.Error{Kind: assay.Denied, Op: "call " + name, Err: cause, Remedy: remedy}
	}
	if !k.expires.IsZero() && !c.now().Before(k.expires) {
		return ctx, k, deny(fmt.Errorf("the certificate of %s expired at %s", k.who, k.expires.Format(time.RFC3339)), "renew it and connect again")
	}
	if k.serial != "" && c.isRefused(k.serial) {
		return ctx, k, deny(fmt.Errorf("the certificate of %s was taken back", k.who), "ask an operator for another one")
	}
	r, ok := access[method]
	if !ok {
		return ctx, k, deny(errors.New("nobody may: the method is not in the access table"), "")
	}
	if !slices.Contains(r.roles, k.role) {
		return ctx, k, deny(fmt.Errorf("%s is %s; it takes %s", k.who, article(k.role), article(r.roles[len(r.roles)-1])), "ask an operator")
	}
	if k.role == hostRole {
		h, ok := c.model.host(k.name)
		if !ok && c.several != nil {
			c.catchUp(ctx) // it may have joined at another control
			h, ok = c.model.host(k.name)
		}
		if !ok {
			return ctx, k, unknownHost(k.name)
		}
		// Whatever control signed it, and whether this one has heard of it before the node was gone.
		if h.Node != "" && c.authority.SignedBy(k.begins).Before(h.Joined) {
			return ctx, k, deny(fmt.Errorf("the certificate of %s was signed before that host joined", k.who), "it is that of the machine that had this name before; join")
		}
	}
	return context.WithValue(ctx, callerKey{}, k), k, nil
}

func article(r role) string {
	if r == anonymous || r == operator {
		return "an " + string(r)
	}
	return "a " + string(r)
}

// unary is the one door for calls: who may, what is recorded, and how errors
// cross the wire.
func (c *Control) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, k, err := c.admitCall(ctx, info.FullMethod)
	var resp any
	if err == nil {
		resp, err = handler(ctx, req)
	}
	if access[info.FullMethod].audited {
		c.record(k, err)
	}
	if err != nil {
		return nil, api.ErrorStatus(err)
	}
	return resp, nil
}

// stream is the same door for streams.
func (c *Control) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, k, err := c.admitCall(ss.Context(), info.FullMethod)
	if err != nil {
		if access[info.FullMethod].audited {
			c.record(k, err)
		}
		return api.ErrorStatus(err)
	}
	return api.ErrorStatus(handler(srv, &serverStream{ss, ctx}))
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *serverStream) Context() context.Context { return s.ctx }

// line is the call's line in the audit trail.
func (c *Control) line(k *call, err error) store.Audit {
	a := store.Audit{Time: c.now(), Who: k.who, Role: string(k.role), Call: k.method[strings.LastIndexByte(k.method, '/')+1:], Subject: cut(k.subject, 1000), Outcome: "ok"}
	if err != nil {
		a.Outcome = cut(err.Error(), 1000)
	}
	return a
}

// record keeps a call that was to change something. One that did has stored its
// line with the change, if the change is in the store.
func (c *Control) record(k *call, err error) {
	if k.again && err == nil {
		return
	}
	a := c.line(k, err)
	if k.role == anonymous || k.role == hostRole { // who joins again
		more, ok := c.nobodies.count(c.now())
		if !ok {
			return
		}
		if more > 0 {
			a.Outcome = cut(fmt.Sprintf("%s (%d more calls of those who join are not recorded)", a.Outcome, more), 1200)
		}
	}
	if !k.recorded || err != nil {
		a.ID = auditID(a.Time)
		c.behind.audit(a)
	}
	c.model.audited(a)
	c.log.Info("called", "who", a.Who, "call", a.Call, "subject", a.Subject, "outcome", a.Outcome)
}

// storeFor is the store for a change that this call makes: the change and its
// line in the audit trail are stored together.
func (c *Control) storeFor(ctx context.Context, subject string) *store.DB {
	k := callOf(ctx)
	k.subject, k.recorded = subject, true
	return c.store.Audited(c.line(k, nil))
}

// nobodies counts the calls of those who are nobody, for the audit trail: there can be
// any number of them, and the trail is also everybody else's. A hundred are recorded,
// and after that one in each second, which says how many were not.
type nobodies struct {
	mu   sync.Mutex
	left float64
	last time.Time
	more int
}

const recordedNobodies = 100

func (n *nobodies) count(now time.Time) (more int, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last.IsZero() {
		n.left = recordedNobodies
	}
	n.left = min(recordedNobodies, n.left+max(0, now.Sub(n.last).Seconds()))
	n.last = now
	if n.left < 1 {
		n.more++
		return 0, false
	}
	n.left--
	more, n.more = n.more, 0
	return more, true
}

// maxJoining bounds the joins under way: each may hold a message.
const maxJoining = 32

// tap looks at a call before its message is read: nobody fills the memory with
// messages of calls that are denied.
func (c *Control) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if who, ok := callerOfTransport(p); ok && who.role != anonymous {
			return ctx, nil
		}
	}
	_, k, err := c.admitCall(ctx, info.FullMethodName)
	if err != nil {
		if access[info.FullMethodName].audited {
			c.record(k, err)
		}
		return ctx, api.ErrorStatus(err)
	}
	if c.joining.Add(1) > maxJoining {
		c.joining.Add(-1)
		return ctx, api.ErrorStatus(&assay.Error{Kind: assay.Unavailable, Op: "join", Err: errors.New("too many join at once"), Remedy: "try again"})
	}
	context.AfterFunc(ctx, func() { c.joining.Add(-1) })
	return ctx, nil
}
