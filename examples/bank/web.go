package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"html/template"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"assay.dev/examples/bank/paymentspb"
)

// Web is the bank's front: a page for people and JSON for programs.
//
//	GET  /                          the accounts, and a form
//	GET  /accounts/{id}             one account
//	GET  /accounts/{id}/statement   its entries, as JSON lines; ?after=SEQ
//	POST /transfers                 an Entry; the Idempotency-Key header gives its key
type Web struct {
	Accounts string // base URL
	Payments string // host:port
	Events   string // NATS URL
	Log      *slog.Logger

	client   *http.Client
	payments paymentspb.PaymentsClient
	events   *nats.Conn
}

// Run serves until ctx ends.
func (s *Web) Run(ctx context.Context, ln net.Listener) error {
	s.client = newClient()
	defer s.client.CloseIdleConnections()
	cc, err := grpc.NewClient(s.Payments, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	s.payments = paymentspb.NewPaymentsClient(cc)
	if s.events, err = connectEvents(s.Events, "web", s.Log); err != nil {
		return err
	}
	defer closeEvents(s.events)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", handle(s.Log, s.index))
	mux.HandleFunc("GET /accounts/{id}", handle(s.Log, s.account))
	mux.HandleFunc("GET /accounts/{id}/statement", handle(s.Log, s.statement))
	mux.HandleFunc("POST /transfers", handle(s.Log, s.transfer))
	return serveHTTP(ctx, ln, mux)
}

var page = template.Must(template.New("page").Funcs(template.FuncMap{"money": money}).Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Example bank</title>
<h1>Example bank</h1>
<p>Services that know nothing of a mesh.</p>
<table><tr><th>Account<th>Holder
{{range .Accounts}}<tr><td><a href="/accounts/{{.ID}}">{{.ID}}</a><td>{{.Holder}}
{{end}}</table>
<form method="post" action="/transfers">
<input type="hidden" name="key" value="{{.Key}}">
<label>From <select name="from">{{range .Accounts}}<option>{{.ID}}{{end}}</select></label>
<label>To <select name="to">{{range .Accounts}}<option>{{.ID}}{{end}}</select></label>
<label>Cents <input name="amount" type="number" min="1" value="100"></label>
<button>Transfer</button>
</form>
</html>
`))

func (s *Web) index(w http.ResponseWriter, r *http.Request) error {
	var data struct {
		Accounts []Account
		Key      string
	}
	data.Key = newKey()
	if err := call(r.Context(), s.client, "GET", s.Accounts+"/accounts", nil, &data.Accounts); err != nil {
		return err
	}
	var b bytes.Buffer
	if err := page.Execute(&b, &data); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write(b.Bytes())
	return nil
}

func (s *Web) account(w http.ResponseWriter, r *http.Request) error {
	var a Account
	if err := call(r.Context(), s.client, "GET", s.Accounts+"/accounts/"+r.PathValue("id"), nil, &a); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, a)
	return nil
}

// statement passes the stream on as it comes. An error after the first entry can
// only be told by ending the answer early.
func (s *Web) statement(w http.ResponseWriter, r *http.Request) error {
	ask := &paymentspb.StatementRequest{Account: r.PathValue("id")}
	if a := r.FormValue("after"); a != "" {
		var err error
		if ask.After, err = strconv.ParseInt(a, 10, 64); err != nil || ask.After < 0 {
			return refuse(http.StatusBadRequest, "after: want a sequence number, not %q", a)
		}
	}
	stream, err := s.payments.Statement(r.Context(), ask)
	if err != nil {
		return rpcError(err)
	}
	enc := json.NewEncoder(w)
	for n := 0; ; n++ {
		p, err := stream.Recv()
		switch {
		case err == io.EOF:
			return nil
		case err != nil && n == 0:
			return rpcError(err)
		case err != nil:
			panic(http.ErrAbortHandler)
		}
		if n == 0 {
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		e := fromProto(p)
		if err := enc.Encode(&e); err != nil {
			return nil // the client went away
		}
	}
}

func (s *Web) transfer(w http.ResponseWriter, r *http.Request) error {
	e, form, err := readTransfer(w, r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	publish(s.events, subjectRequested, &e, s.Log)
	booked, err := s.payments.Transfer(ctx, &paymentspb.TransferRequest{Key: e.Key, From: e.From, To: e.To,
		Amount: e.Amount, Currency: e.Currency, Text: e.Text})
	if err != nil {
		return rpcError(err)
	}
	if form {
		http.Redirect(w, r, "/accounts/"+booked.To, http.StatusSeeOther)
		return nil
	}
	writeJSON(w, http.StatusCreated, fromProto(booked))
	return nil
}

// readTransfer reads a program's JSON or a person's form.
func readTransfer(w http.ResponseWriter, r *http.Request) (e Entry, form bool, err error) {
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if kind == "application/x-www-form-urlencoded" {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		e = Entry{Key: r.PostFormValue("key"), From: r.PostFormValue("from"), To: r.PostFormValue("to"), Currency: Currency}
		if e.Amount, err = strconv.ParseInt(r.PostFormValue("amount"), 10, 64); err != nil {
			return e, true, refuse(http.StatusBadRequest, "amount: %v", err)
		}
		form = true
	} else if err := readJSON(w, r, &e); err != nil {
		return e, false, err
	}
	if k := r.Header.Get("Idempotency-Key"); k != "" {
		e.Key = k
	}
	e.Seq, e.Time = 0, time.Time{}
	if err := e.Check(); err != nil {
		return e, form, refuse(http.StatusBadRequest, "%v", err)
	}
	return e, form, nil
}

// rpcError turns a gRPC status into an HTTP one.
func rpcError(err error) error {
	code := http.StatusBadGateway
	switch status.Code(err) {
	case codes.InvalidArgument:
		code = http.StatusBadRequest
	case codes.NotFound:
		code = http.StatusNotFound
	case codes.AlreadyExists:
		code = http.StatusConflict
	case codes.FailedPrecondition:
		code = http.StatusUnprocessableEntity
	case codes.DeadlineExceeded:
		code = http.StatusGatewayTimeout
	}
	if s, ok := status.FromError(err); ok {
		err = errors.New("payments: " + s.Message())
	}
	return &statusError{code, err.Error()}
}
