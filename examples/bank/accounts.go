package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Accounts knows who holds which account and asks the ledger for balances. It keeps
// no state, so any number of replicas may run.
type Accounts struct {
	Ledger string // base URL
	Count  int    // accounts XX00ASSAYBANK0001 to Count
	Log    *slog.Logger

	client *http.Client
}

// holders are the people of the demo; account n belongs to holder n modulo their number.
var holders = []string{"Test Person One", "Test Person Two", "Test Company Three", "Test Trust Four"}

// Run serves until ctx ends.
func (a *Accounts) Run(ctx context.Context, ln net.Listener) error {
	defer a.client.CloseIdleConnections()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /accounts", handle(a.Log, a.list))
	mux.HandleFunc("GET /accounts/{id}", handle(a.Log, a.get))
	return serveHTTP(ctx, ln, mux)
}

// Open books the opening balances, before anybody can connect. The keys make that
// harmless to repeat, by a second replica or after a restart.
func (a *Accounts) Open(ctx context.Context) error {
	a.client = newClient()
	for n := 1; n <= a.Count; n++ {
		e := Entry{Key: "opening-" + accountID(n), From: ownAccount, To: accountID(n), Amount: openingBalance, Currency: Currency, Text: "opening balance"}
		for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
			err := call(ctx, a.client, "POST", a.Ledger+"/entries", e, new(Entry))
			if err == nil {
				break
			}
			a.Log.Info("waiting for the ledger", "err", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(wait):
			}
		}
	}
	return nil
}

func (a *Accounts) find(id string) (Account, error) {
	var n int
	if _, err := fmt.Sscanf(id, Marker+"%04d", &n); err != nil || n < 1 || n > a.Count || accountID(n) != id {
		return Account{}, refuse(http.StatusNotFound, "no account %s", id)
	}
	return Account{ID: id, Holder: holders[n%len(holders)], Currency: Currency}, nil
}

func (a *Accounts) get(w http.ResponseWriter, r *http.Request) error {
	acc, err := a.find(r.PathValue("id"))
	if err != nil {
		return err
	}
	var b Balance
	if err := call(r.Context(), a.client, "GET", a.Ledger+"/accounts/"+acc.ID+"/balance", nil, &b); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	acc.Balance = b.Balance
	writeJSON(w, http.StatusOK, acc)
	return nil
}

// list names the accounts without their balances.
func (a *Accounts) list(w http.ResponseWriter, r *http.Request) error {
	list := make([]Account, a.Count)
	for n := range list {
		list[n], _ = a.find(accountID(n + 1))
	}
	writeJSON(w, http.StatusOK, list)
	return nil
}
