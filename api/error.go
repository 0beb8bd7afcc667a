package api

import (
	"context"
	"errors"

	"assay.dev"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var kindCode = map[assay.Kind]codes.Code{
	assay.Internal:    codes.Internal,
	assay.Invalid:     codes.InvalidArgument,
	assay.Denied:      codes.PermissionDenied,
	assay.NotFound:    codes.NotFound,
	assay.Conflict:    codes.AlreadyExists,
	assay.Unavailable: codes.Unavailable,
}

// ErrorStatus turns an error into what gRPC sends. An error that is not an
// assay.Error travels as text with kind Internal; a gRPC status stays what it is.
func ErrorStatus(err error) error {
	if err == nil {
		return nil
	}
	e, ok := errors.AsType[*assay.Error](err)
	if !ok {
		if _, is := status.FromError(err); is {
			return err
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return status.FromContextError(err).Err()
		}
		return status.Error(codes.Internal, err.Error())
	}
	st := status.New(kindCode[e.Kind], err.Error())
	p := &Problem{Op: e.Op, Remedy: e.Remedy}
	if e.Err != nil {
		p.Cause = e.Err.Error()
	}
	if with, err := st.WithDetails(p); err == nil {
		st = with
	}
	return st.Err()
}

// StatusError is the inverse: it turns what gRPC returned into an assay.Error
// with the same parts. op is used when the other side did not say what it did.
func StatusError(op string, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return &assay.Error{Kind: assay.KindOf(err), Op: op, Err: err}
	}
	e := &assay.Error{Op: op, Err: errors.New(st.Message())}
	for kind, code := range kindCode {
		if code == st.Code() {
			e.Kind = kind
		}
	}
	switch st.Code() {
	case codes.Unauthenticated:
		e.Kind = assay.Denied
	case codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted:
		e.Kind = assay.Unavailable
	case codes.Canceled:
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: context.Canceled}
	}
	for _, d := range st.Details() {
		if p, ok := d.(*Problem); ok {
			e.Op, e.Remedy = p.Op, p.Remedy
			e.Err = nil
			if p.Cause != "" {
				e.Err = errors.New(p.Cause)
			}
		}
	}
	return e
}
