package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// Subjects that the bank publishes. Payloads are Entry in JSON.
const (
	subjectRequested = "transfers.requested" // by web, before it asks payments
	subjectBooked    = "transfers.booked"    // by payments, after the ledger booked
)

// Ledger serves the journal over HTTP and reconciles it with what the events
// announce. Bookings travel over HTTP only: an event that is lost costs a line in
// the audit, never money.
type Ledger struct {
	Events  string // NATS URL
	Journal *Journal
	Log     *slog.Logger

	requested, booked, unknown atomic.Int64
}

// Audit is the ledger's view of itself.
type Audit struct {
	Entries   int   `json:"entries"`
	Sum       int64 `json:"sum"`       // of all balances: always 0
	Requested int64 `json:"requested"` // transfers announced by web
	Booked    int64 `json:"booked"`    // transfers announced by payments
	Unknown   int64 `json:"unknown"`   // announced as booked, and not in the books
}

// Run serves until ctx ends.
func (l *Ledger) Run(ctx context.Context, ln net.Listener) error {
	nc, err := connectEvents(l.Events, "ledger", l.Log)
	if err != nil {
		return err
	}
	defer closeEvents(nc)
	if _, err := nc.Subscribe("transfers.*", l.announced); err != nil {
		return fmt.Errorf("subscribe to transfers: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /entries", handle(l.Log, l.book))
	mux.HandleFunc("GET /accounts/{id}/balance", handle(l.Log, l.balance))
	mux.HandleFunc("GET /accounts/{id}/entries", handle(l.Log, l.entries))
	mux.HandleFunc("GET /audit", handle(l.Log, l.audit))
	return serveHTTP(ctx, ln, mux)
}

func (l *Ledger) book(w http.ResponseWriter, r *http.Request) error {
	var e Entry
	if err := readJSON(w, r, &e); err != nil {
		return err
	}
	booked, fresh, err := l.Journal.Book(e, time.Now())
	if err != nil {
		return err
	}
	code := http.StatusOK
	if fresh {
		code = http.StatusCreated
	}
	writeJSON(w, code, booked)
	return nil
}

// Balance is the answer to GET /accounts/{id}/balance.
type Balance struct {
	Account string `json:"account"`
	Balance int64  `json:"balance"`
	Entries int    `json:"entries"`
}

func (l *Ledger) balance(w http.ResponseWriter, r *http.Request) error {
	b := Balance{Account: r.PathValue("id")}
	b.Balance, b.Entries = l.Journal.Balance(b.Account)
	writeJSON(w, http.StatusOK, b)
	return nil
}

// entries streams an account's entries as JSON lines, a page at a time, so that a
// long statement is in nobody's memory.
func (l *Ledger) entries(w http.ResponseWriter, r *http.Request) error {
	var after int64
	if s := r.FormValue("after"); s != "" {
		var err error
		if after, err = strconv.ParseInt(s, 10, 64); err != nil || after < 0 {
			return refuse(http.StatusBadRequest, "after: want a sequence number, not %q", s)
		}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	for {
		page := l.Journal.Entries(r.PathValue("id"), after, 100)
		if len(page) == 0 {
			return nil
		}
		if _, err := w.Write(encode(page)); err != nil {
			return nil // the client went away
		}
		http.NewResponseController(w).Flush()
		after = page[len(page)-1].Seq
	}
}

func (l *Ledger) audit(w http.ResponseWriter, r *http.Request) error {
	a := Audit{Requested: l.requested.Load(), Booked: l.booked.Load(), Unknown: l.unknown.Load()}
	a.Entries, a.Sum = l.Journal.Totals()
	writeJSON(w, http.StatusOK, a)
	return nil
}

func (l *Ledger) announced(m *nats.Msg) {
	var e Entry
	if err := json.Unmarshal(m.Data, &e); err != nil {
		l.unknown.Add(1)
		l.Log.Error("announcement", "subject", m.Subject, "err", err)
		return
	}
	switch m.Subject {
	case subjectRequested:
		l.requested.Add(1)
	case subjectBooked:
		l.booked.Add(1)
		if !l.Journal.Booked(e.Key) {
			l.unknown.Add(1)
			l.Log.Error("announced and not booked", "key", e.Key)
		}
	}
}
