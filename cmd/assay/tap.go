package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

func tapCommand() *cobra.Command {
	var conn connection
	var w assay.Watch
	var namespace, peer, status, output string
	var client bool
	var count int
	cmd := &cobra.Command{
		Use:   "tap SERVICE",
		Short: "Show requests of a service while they happen",
		Long: `Show the HTTP requests of a service as they end: when, from whom, what was asked for, and
what came of it. Bodies are never shown. Queries, cookies and fields that look like
credentials are shown as ` + assay.Redacted + ` unless --reveal names them.

It takes the operator role, and who tapped what is recorded (assay get audit). Each
proxy tells at most --rate requests per second; how many more there were is said.
What a proxy relays without reading it (opaque connections) has no requests to show.`,
		Example: `  assay tap payments
  assay tap payments -n bank --status 5xx --path /v1/
  assay tap payments --fields --reveal authorization -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			op := "tap " + args[0]
			if err := checkFormat(output, "table", "wide", "json"); err != nil {
				return err
			}
			bad := func(flag string, err error) error {
				return &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("%s: %w", flag, err)}
			}
			w.Service = args[0]
			if !strings.Contains(w.Service, "/") {
				w.Service = namespace + "/" + w.Service
			}
			w.Direction = assay.Inbound
			if client {
				w.Direction = assay.Outbound
			}
			var err error
			if peer != "" {
				if w.Peer, err = assay.ParseIdentity(peer); err != nil {
					return bad("--from", err)
				}
			}
			if w.MinStatus, w.MaxStatus, err = statuses(status); err != nil {
				return bad("--status", err)
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			return o.tap(cmd.Context(), cmd.OutOrStdout(), op, &w, output, count)
		},
	}
	conn.flags(cmd)
	f := cmd.Flags()
	f.StringVarP(&namespace, "namespace", "n", "default", "the service's namespace")
	f.StringVar(&peer, "from", "", "only with this SPIFFE ID at the other end")
	f.StringVar(&w.Method, "method", "", "only this method")
	f.StringVar(&w.Path, "path", "", "only paths that begin so")
	f.StringVar(&status, "status", "", "only this status: 404, 5xx or 400-499; 0 is none")
	f.BoolVar(&client, "client", false, "as the clients' proxies see them, with what never arrived")
	f.BoolVar(&w.Fields, "fields", false, "with the request's header fields (-o wide or json)")
	f.StringSliceVar(&w.Reveal, "reveal", nil, "show these header fields' values; 'query' for the query")
	f.IntVar(&w.Rate, "rate", 100, "requests per second that each proxy tells at most")
	f.IntVar(&count, "count", 0, "end after so many; 0: at Ctrl-C")
	f.StringVarP(&output, "output", "o", "table", "table, wide or json (a line for each)")
	return cmd
}

// statuses reads 404, 5xx or 400-499.
func statuses(s string) (low, high int, err error) {
	bad := fmt.Errorf("%q, want for instance 404, 5xx or 400-499", s)
	switch from, to, ranged := strings.Cut(s, "-"); {
	case s == "":
		return 0, 0, nil
	case len(s) == 3 && strings.HasSuffix(s, "xx") && s[0] >= '1' && s[0] <= '5':
		low = int(s[0]-'0') * 100
		return low, low + 99, nil
	case ranged:
		low, err = strconv.Atoi(from)
		high, err2 := strconv.Atoi(to)
		if err != nil || err2 != nil || low > high {
			return 0, 0, bad
		}
		return low, high, nil
	case s == "0":
		return 0, 0, errors.New("0 alone cannot be asked for; 0-99 can")
	}
	if low, err = strconv.Atoi(s); err != nil || low < 0 {
		return 0, 0, bad
	}
	return low, low, nil
}

// tap prints requests until ctx ends, or count of them were printed.
func (o *operator) tap(ctx context.Context, out io.Writer, op string, w *assay.Watch, format string, count int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch, err := json.Marshal(w)
	if err != nil {
		return err
	}
	stream, err := o.Tap(ctx, &api.TapRequest{Watch: watch})
	if err != nil {
		return explain(op, o.name, err)
	}
	for n := 0; count == 0 || n < count; {
		e, err := stream.Recv()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, io.EOF) {
				return nil
			}
			return explain(op, o.name, err)
		}
		if len(e.GetRecord()) > 0 {
			var r assay.Record
			if err := json.Unmarshal(e.GetRecord(), &r); err != nil {
				return err
			}
			r.Watches = nil
			if err := printRecord(out, &r, format); err != nil {
				return err
			}
			n++
		}
		if d := e.GetDropped(); d > 0 && format != "json" {
			fmt.Fprintf(out, "… and %d more that are not shown (--rate)\n", d)
		}
	}
	return nil
}

func printRecord(out io.Writer, r *assay.Record, format string) error {
	if format == "json" {
		return json.NewEncoder(out).Encode(r)
	}
	peer := "outside"
	if !r.Peer.IsZero() {
		peer = party(r.Peer)
	}
	target := r.Path
	if r.Query != "" {
		target += "?" + r.Query
	}
	result := strconv.Itoa(r.Status)
	if r.Status == 0 {
		result = "-"
	}
	if r.GRPC != nil {
		result += fmt.Sprintf(" grpc %d", r.GRPC.Code)
	}
	if r.Failure != "" {
		result += " " + r.Failure
	}
	if _, err := fmt.Fprintf(out, "%s  %s -> %s  %s %s  %s  %s  %d B in, %d B out  %s\n", r.Time.Local().Format("15:04:05.000"), quoted(peer), party(r.Identity),
		quoted(r.Method), quoted(target), quoted(result), r.Duration.Round(10*time.Microsecond), r.RequestBytes, r.ResponseBytes, quoted(string(r.Security))); err != nil {
		return err
	}
	if format == "wide" {
		for _, f := range r.Fields {
			if _, err := fmt.Fprintf(out, "    %s: %s\n", quoted(f.Name), quoted(f.Value)); err != nil {
				return err
			}
		}
	}
	return nil
}

// quoted keeps what a stranger sent from speaking to the terminal.
func quoted(s string) string {
	if q := strconv.Quote(s); len(q) != len(s)+2 {
		return q
	}
	return s
}
