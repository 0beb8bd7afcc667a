package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Marker begins every account number of this bank. XX is a country code that is
// never assigned, so the numbers look like IBANs and belong to nobody. Every
// payload of the bank names an account: whoever reads traffic on a wire and finds
// the marker has read a payload in clear.
const Marker = "XX00ASSAYBANK"

// Currency is the one currency that the bank keeps accounts in (ISO 4217).
const Currency = "EUR"

// ownAccount is the bank's own: opening balances come from it, so it is negative
// and the sum of all accounts is always zero.
const ownAccount = Marker + "0000"

// openingBalance is what a new account holds: 1,000,000.00.
const openingBalance = 100_000_000

// maxAmount bounds one entry, far from where int64 sums overflow.
const maxAmount = 1_000_000_000_00

// accountID returns the number of account n, n >= 1.
func accountID(n int) string { return fmt.Sprintf("%s%04d", Marker, n) }

// Account is what the accounts service tells about one account.
type Account struct {
	ID       string `json:"id"`
	Holder   string `json:"holder"`
	Currency string `json:"currency"`
	Balance  int64  `json:"balance"` // minor units
}

// Entry is one line of the ledger: an amount moved from one account to another.
// Entries are never changed or removed.
type Entry struct {
	Seq      int64     `json:"seq,omitempty"` // given by the ledger, from 1, without gaps
	Key      string    `json:"key"`           // idempotency key
	From     string    `json:"from"`
	To       string    `json:"to"`
	Amount   int64     `json:"amount"` // minor units, positive
	Currency string    `json:"currency"`
	Text     string    `json:"text,omitempty"`
	Time     time.Time `json:"time,omitzero"` // given by the ledger
}

// Check returns what is wrong with an entry that somebody asks to book.
func (e *Entry) Check() error {
	switch {
	case e.Key == "" || len(e.Key) > 128:
		return errors.New("key: want 1 to 128 characters")
	case !validAccount(e.From) || !validAccount(e.To):
		return fmt.Errorf("from and to: want account numbers that begin with %s", Marker)
	case e.From == e.To:
		return errors.New("from and to are the same account")
	case e.Amount <= 0 || e.Amount > maxAmount:
		return fmt.Errorf("amount: want 1 to %d minor units", int64(maxAmount))
	case e.Currency != Currency:
		return fmt.Errorf("currency: accounts are kept in %s", Currency)
	case len(e.Text) > 140:
		return errors.New("text: want at most 140 bytes")
	}
	return nil
}

// same reports whether a repeated request asks for what was booked.
func (e *Entry) same(o *Entry) bool {
	return e.From == o.From && e.To == o.To && e.Amount == o.Amount && e.Currency == o.Currency && e.Text == o.Text
}

func validAccount(id string) bool {
	n, ok := strings.CutPrefix(id, Marker)
	if !ok || len(n) != 4 {
		return false
	}
	for _, c := range n {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// money writes minor units for people: 1250 is "12.50".
func money(minor int64) string {
	sign := ""
	u := uint64(minor)
	if minor < 0 {
		sign, u = "-", -u
	}
	return fmt.Sprintf("%s%d.%02d", sign, u/100, u%100)
}

// newKey returns a fresh idempotency key.
func newKey() string { return rand.Text() }
