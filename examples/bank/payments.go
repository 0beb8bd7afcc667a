package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"assay.dev/examples/bank/paymentspb"
)

// Payments books transfers: it asks accounts whether both sides exist, the ledger to
// book, and announces what was booked.
type Payments struct {
	paymentspb.UnimplementedPaymentsServer

	Accounts string // base URL
	Ledger   string // base URL
	Events   string // NATS URL
	Log      *slog.Logger

	client *http.Client
	events *nats.Conn
}

// Run serves until ctx ends.
func (p *Payments) Run(ctx context.Context, ln net.Listener) error {
	p.client = newClient()
	defer p.client.CloseIdleConnections()
	var err error
	if p.events, err = connectEvents(p.Events, "payments", p.Log); err != nil {
		return err
	}
	defer closeEvents(p.events)

	srv := grpc.NewServer()
	paymentspb.RegisterPaymentsServer(srv, p)
	reflection.Register(srv)
	hs := health.NewServer()
	hs.SetServingStatus(paymentspb.Payments_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(srv, hs)

	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	hs.Shutdown()
	hard := time.AfterFunc(5*time.Second, srv.Stop)
	defer hard.Stop()
	srv.GracefulStop()
	if err := <-done; !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Transfer books one transfer.
func (p *Payments) Transfer(ctx context.Context, r *paymentspb.TransferRequest) (*paymentspb.Entry, error) {
	e := Entry{Key: r.Key, From: r.From, To: r.To, Amount: r.Amount, Currency: r.Currency, Text: r.Text}
	if err := e.Check(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	for _, id := range []string{e.From, e.To} {
		if err := call(ctx, p.client, "GET", p.Accounts+"/accounts/"+id, nil, new(Account)); err != nil {
			return nil, upstream("accounts", err)
		}
	}
	var booked Entry
	if err := call(ctx, p.client, "POST", p.Ledger+"/entries", e, &booked); err != nil {
		return nil, upstream("ledger", err)
	}
	publish(p.events, subjectBooked, &booked, p.Log)
	return toProto(&booked), nil
}

// Statement streams what the ledger streams.
func (p *Payments) Statement(r *paymentspb.StatementRequest, stream grpc.ServerStreamingServer[paymentspb.Entry]) error {
	ctx := stream.Context()
	if err := call(ctx, p.client, "GET", p.Accounts+"/accounts/"+r.Account, nil, new(Account)); err != nil {
		return upstream("accounts", err)
	}
	resp, err := send(ctx, p.client, "GET", fmt.Sprintf("%s/accounts/%s/entries?after=%d", p.Ledger, r.Account, r.After), nil)
	if err != nil {
		return upstream("ledger", err)
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); d.More(); {
		var e Entry
		if err := d.Decode(&e); err != nil {
			return upstream("ledger", err)
		}
		if err := stream.Send(toProto(&e)); err != nil {
			return err
		}
	}
	return nil
}

// upstream turns an error of accounts or ledger into a gRPC status.
func upstream(who string, err error) error {
	code := codes.Unavailable
	if e, ok := errors.AsType[*statusError](err); ok {
		switch e.Code {
		case http.StatusBadRequest:
			code = codes.InvalidArgument
		case http.StatusNotFound:
			code = codes.NotFound
		case http.StatusConflict:
			code = codes.AlreadyExists
		case http.StatusUnprocessableEntity:
			code = codes.FailedPrecondition
		}
	}
	return status.Errorf(code, "%s: %v", who, err)
}

func toProto(e *Entry) *paymentspb.Entry {
	return &paymentspb.Entry{Seq: e.Seq, Key: e.Key, From: e.From, To: e.To, Amount: e.Amount,
		Currency: e.Currency, Text: e.Text, Time: e.Time.UnixMicro()}
}

func fromProto(e *paymentspb.Entry) Entry {
	return Entry{Seq: e.Seq, Key: e.Key, From: e.From, To: e.To, Amount: e.Amount,
		Currency: e.Currency, Text: e.Text, Time: time.UnixMicro(e.Time).UTC()}
}
