package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Load drives the web front like a bounded number of people: each client has one
// request in flight at most.
type Load struct {
	Target    string        // base URL of web
	Accounts  int           // accounts that exist
	Clients   int           // requests in flight at most
	Rate      float64       // requests per second over all clients; 0: as fast as they come back
	Duration  time.Duration // 0: no bound
	Count     int64         // requests; 0: no bound
	Transfers float64       // share of transfers, 0 to 1
	Wait      time.Duration // how long web may take to appear; not counted
	Fresh     bool          // a new connection, and so a new name look-up, for each request
	Log       *slog.Logger

	client  *http.Client
	next    atomic.Int64 // tickets drawn
	lastSeq atomic.Int64 // newest entry that we caused
	tally   tally
}

// Summary is what a run prints. Latencies are from sending a request to the end of
// its answer, as upper bounds within 2 %.
type Summary struct {
	Requests  int64    `json:"requests"`
	Failures  int64    `json:"failures"`
	Transfers int64    `json:"transfers"`
	Reads     int64    `json:"reads"`
	Seconds   float64  `json:"seconds"`
	Rate      float64  `json:"rate"` // requests per second
	LatencyMS Quantile `json:"latency_ms"`
	Errors    []string `json:"errors,omitempty"` // the first few
}

// Quantile holds latencies in milliseconds.
type Quantile struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// Run drives the target until its bound or until ctx ends, which is no failure.
func (l *Load) Run(ctx context.Context) (Summary, error) {
	l.client = newClient()
	l.client.Transport.(*http.Transport).DisableKeepAlives = l.Fresh
	defer l.client.CloseIdleConnections()
	if err := l.await(ctx); err != nil {
		return Summary{}, err
	}
	l.Log.Info("load begins", "target", l.Target)
	start := time.Now()
	stop := ctx
	if l.Duration > 0 {
		var cancel context.CancelFunc
		stop, cancel = context.WithDeadline(ctx, start.Add(l.Duration))
		defer cancel()
	}
	var wg sync.WaitGroup
	for n := range l.Clients {
		rnd := rand.New(rand.NewPCG(uint64(n), uint64(start.UnixNano())))
		wg.Go(func() { l.person(ctx, stop, start, rnd) })
	}
	wg.Wait()
	return l.tally.summary(time.Since(start)), nil
}

// person sends one request after the other. stop ends the sending, ctx what is in flight.
func (l *Load) person(ctx, stop context.Context, start time.Time, rnd *rand.Rand) {
	for {
		n := l.next.Add(1) - 1
		if l.Count > 0 && n >= l.Count {
			return
		}
		if l.Rate > 0 {
			due := start.Add(time.Duration(float64(n) / l.Rate * float64(time.Second)))
			select {
			case <-stop.Done():
			case <-time.After(time.Until(due)):
			}
		}
		if stop.Err() != nil {
			return
		}
		begun := time.Now()
		transfer := rnd.Float64() < l.Transfers
		var err error
		if transfer {
			err = l.transfer(ctx, rnd)
		} else {
			err = l.read(ctx, rnd)
		}
		if ctx.Err() != nil {
			return // cut off by us
		}
		l.tally.add(time.Since(begun), transfer, err)
	}
}

// await returns when web answers.
func (l *Load) await(ctx context.Context) error {
	deadline := time.Now().Add(l.Wait)
	for {
		err := l.get(ctx, "/accounts/"+accountID(1))
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not answer: %w", l.Target, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (l *Load) transfer(ctx context.Context, rnd *rand.Rand) error {
	from := 1 + rnd.IntN(l.Accounts)
	to := 1 + rnd.IntN(l.Accounts-1)
	if to >= from {
		to++
	}
	e := Entry{Key: newKey(), From: accountID(from), To: accountID(to), Amount: 1 + rnd.Int64N(5000), Currency: Currency, Text: "load"}
	var booked Entry
	if err := call(ctx, l.client, "POST", l.Target+"/transfers", e, &booked); err != nil {
		return err
	}
	if booked.Key != e.Key || !booked.same(&e) || booked.Seq == 0 {
		return fmt.Errorf("transfer %s: booked something else: %+v", e.Key, booked)
	}
	l.lastSeq.Store(booked.Seq)
	return nil
}

func (l *Load) read(ctx context.Context, rnd *rand.Rand) error {
	id := accountID(1 + rnd.IntN(l.Accounts))
	switch p := rnd.IntN(10); {
	case p < 7:
		var a Account
		err := call(ctx, l.client, "GET", l.Target+"/accounts/"+id, nil, &a)
		if err == nil && a.ID != id {
			err = fmt.Errorf("asked for account %s, got %q", id, a.ID)
		}
		return err
	case p < 9:
		return l.get(ctx, "/")
	default:
		return l.get(ctx, fmt.Sprintf("/accounts/%s/statement?after=%d", id, max(l.lastSeq.Load()-50, 0)))
	}
}

// get reads an answer to its end.
func (l *Load) get(ctx context.Context, path string) error {
	resp, err := send(ctx, l.client, "GET", l.Target+path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// tally counts. Its buckets grow by 2 %, from 10 us.
type tally struct {
	mu        sync.Mutex
	buckets   [1024]int64
	count     int64
	failures  int64
	transfers int64
	max       time.Duration
	errors    []string
}

const (
	tallyBase   = 10 * time.Microsecond
	tallyGrowth = 1.02
)

func (t *tally) add(d time.Duration, transfer bool, err error) {
	i := 0
	if d > tallyBase {
		i = int(math.Log(float64(d)/float64(tallyBase)) / math.Log(tallyGrowth))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buckets[min(i, len(t.buckets)-1)]++
	t.count++
	t.max = max(t.max, d)
	if transfer {
		t.transfers++
	}
	if err != nil {
		t.failures++
		if len(t.errors) < 5 {
			t.errors = append(t.errors, err.Error())
		}
	}
}

func (t *tally) summary(took time.Duration) Summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Summary{Requests: t.count, Failures: t.failures, Transfers: t.transfers, Reads: t.count - t.transfers,
		Seconds: round(took.Seconds()), Errors: t.errors}
	if took > 0 {
		s.Rate = round(float64(t.count) / took.Seconds())
	}
	s.LatencyMS = Quantile{P50: t.quantile(0.5), P90: t.quantile(0.9), P99: t.quantile(0.99), Max: millis(t.max)}
	return s
}

func (t *tally) quantile(q float64) float64 {
	rank := max(int64(math.Ceil(q*float64(t.count))), 1)
	var seen int64
	for i, n := range t.buckets {
		if seen += n; seen >= rank {
			bound := time.Duration(float64(tallyBase) * math.Pow(tallyGrowth, float64(i+1)))
			return millis(min(bound, t.max))
		}
	}
	return 0
}

func millis(d time.Duration) float64 { return round(float64(d) / float64(time.Millisecond)) }

func round(f float64) float64 { return math.Round(f*1000) / 1000 }

// errLoad is the exit code of a run with failures.
var errLoad = errors.New("requests failed")

// printSummary writes s as one line of JSON.
func printSummary(w io.Writer, s Summary) error {
	if err := json.NewEncoder(w).Encode(&s); err != nil {
		return err
	}
	if s.Failures > 0 || s.Requests == 0 {
		return fmt.Errorf("%d of %d: %w", s.Failures, s.Requests, errLoad)
	}
	return nil
}
