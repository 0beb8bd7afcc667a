// Bank is a small bank of five services, a load generator and a probe, made to be
// run in a service mesh that it knows nothing about: plain HTTP, gRPC and NATS
// clients, names instead of addresses, no TLS.
//
//	load -> web -> accounts -> ledger -> events
//	          \ -> payments -> accounts, ledger, events
//	          \ -> events
//
// It is not an example of how to build a bank. What it takes seriously is what a
// mesh must not break: money is integers in minor units, every transfer has an
// idempotency key, the ledger is append-only and on disk before it answers,
// connections live long and come back.
//
// Tour: main.go (commands), bank.go (nouns), journal.go and ledger.go, accounts.go,
// payments.go (gRPC, paymentspb), web.go, events.go (the NATS server and its
// clients), load.go, probe.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: bank COMMAND [flags]

Services:
  web        HTTP front: GET /, POST /transfers, GET /accounts/{id}
  accounts   HTTP: who holds which account; any number of replicas
  payments   gRPC with reflection and health
  ledger     HTTP: the append-only journal
  events     a NATS server

Clients:
  load       drives web and prints a summary; exit code 1 when a request failed
  probe      measures the first byte of a server that speaks first

'bank COMMAND -h' shows a command's flags.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil, errors.Is(err, context.Canceled):
	case errors.Is(err, flag.ErrHelp):
	default:
		fmt.Fprintln(os.Stderr, "bank:", err)
		stop()
		os.Exit(1)
	}
}

// run is main without the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return errors.New("which command?")
	}
	name := args[0]
	f := flag.NewFlagSet("bank "+name, flag.ContinueOnError)
	f.SetOutput(stderr)
	log := slog.New(slog.NewTextHandler(stderr, nil)).With("service", name)

	// What several commands share, with the names that the demo gives them.
	listen := func(def string) *string { return f.String("listen", def, "`address` to serve on") }
	accounts := func() *string { return f.String("accounts", "http://accounts:8080", "`URL` of accounts") }
	ledger := func() *string { return f.String("ledger", "http://ledger:8080", "`URL` of ledger") }
	events := func() *string { return f.String("events", "nats://events:4222", "`URL` of events") }
	count := func() *int { return f.Int("count", 20, "number of accounts, 2 to 9999") }

	var start func() error
	switch name {
	case "web":
		addr, s := listen(":8080"), &Web{Log: log}
		a, e := accounts(), events()
		p := f.String("payments", "payments:50051", "`host:port` of payments")
		start = func() error {
			s.Accounts, s.Payments, s.Events = base(*a), *p, *e
			return serve(ctx, log, *addr, s.Run)
		}
	case "accounts":
		addr, l, n := listen(":8080"), ledger(), count()
		start = func() error {
			if *n < 2 || *n > 9999 {
				return fmt.Errorf("--count %d: want 2 to 9999", *n)
			}
			a := &Accounts{Ledger: base(*l), Count: *n, Log: log}
			if err := a.Open(ctx); err != nil {
				return err
			}
			return serve(ctx, log, *addr, a.Run)
		}
	case "payments":
		addr, s := listen(":50051"), &Payments{Log: log}
		a, l, e := accounts(), ledger(), events()
		start = func() error {
			s.Accounts, s.Ledger, s.Events = base(*a), base(*l), *e
			return serve(ctx, log, *addr, s.Run)
		}
	case "ledger":
		addr, e := listen(":8080"), events()
		file := f.String("file", "", "append-only `file`; without one the journal is in memory")
		start = func() error {
			j, err := OpenJournal(*file)
			if err != nil {
				return err
			}
			err = serve(ctx, log, *addr, (&Ledger{Events: *e, Journal: j, Log: log}).Run)
			return errors.Join(err, j.Close())
		}
	case "events":
		addr := listen(":4222")
		start = func() error {
			s, err := newEvents(*addr)
			if err != nil {
				return err
			}
			log.Info("serving", "addr", *addr)
			return runEvents(ctx, s)
		}
	case "load":
		l := Load{Log: log}
		f.StringVar(&l.Target, "target", "http://web:8080", "`URL` of web")
		f.IntVar(&l.Accounts, "accounts", 20, "number of accounts that exist")
		f.IntVar(&l.Clients, "clients", 8, "requests in flight at most")
		f.Float64Var(&l.Rate, "rate", 100, "requests per second; 0: as fast as answers come")
		f.DurationVar(&l.Duration, "duration", 10*time.Second, "how long; 0: until --count or a signal")
		f.Int64Var(&l.Count, "count", 0, "how many requests; 0: until --duration")
		f.Float64Var(&l.Transfers, "transfers", 0.4, "share of transfers, 0 to 1")
		f.BoolVar(&l.Fresh, "fresh", false, "a new connection for each request")
		f.DurationVar(&l.Wait, "wait", 30*time.Second, "how long web may take to answer at first")
		start = func() error {
			if l.Accounts < 2 || l.Clients < 1 || l.Rate < 0 || l.Transfers < 0 || l.Transfers > 1 {
				return errors.New("load: want --accounts >= 2, --clients >= 1, --rate >= 0, --transfers 0 to 1")
			}
			l.Target = base(l.Target)
			s, err := l.Run(ctx)
			if err != nil {
				return err
			}
			return printSummary(stdout, s)
		}
	case "probe":
		p := &Probe{}
		f.StringVar(&p.Target, "target", "events:4222", "`host:port` of the server")
		f.IntVar(&p.Count, "count", 20, "how many connections")
		f.StringVar(&p.Want, "want", "INFO ", "what its first line begins with")
		wait := f.Bool("wait", false, "begin when something comes on standard input, or its end")
		start = func() error {
			if *wait {
				p.Begin = os.Stdin
			}
			if p.Count < 1 {
				return errors.New("probe: want --count >= 1")
			}
			return p.Run(ctx, stdout)
		}
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return nil
	default:
		fmt.Fprint(stderr, usage)
		return fmt.Errorf("no command %q", name)
	}
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("%s: what is %q?", name, f.Arg(0))
	}
	return start()
}

// base is a URL without the slash at its end.
func base(url string) string { return strings.TrimSuffix(url, "/") }

// serve listens, says where, and runs.
func serve(ctx context.Context, log *slog.Logger, addr string, run func(context.Context, net.Listener) error) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	log.Info("serving", "addr", ln.Addr())
	return run(ctx, ln)
}
