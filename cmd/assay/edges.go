package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
)

func edgesCommand() *cobra.Command {
	var conn connection
	var namespace, output string
	var interval time.Duration
	var watch, exceptions bool
	cmd := &cobra.Command{
		Use:   "edges [SERVICE]",
		Short: "Show who talks to whom, whether it is encrypted, and which artifacts they run",
		Long: `Show who talks to whom: identity and artifact at both ends, the service that was
dialled, the protocol, whether it is encrypted or why not, and how much.

-n keeps edges with an end or a service in the namespace, SERVICE those to the
service, --exceptions those that are not under mutual TLS. -o json is the totals
since the proxies started.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(checkFormat(output, "table", "wide", "json"), checkInterval(interval)); err != nil {
				return err
			}
			service := ""
			if len(args) == 1 {
				service = args[0]
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			e := &edges{operator: o, namespace: namespace, service: service, exceptions: exceptions}
			if output == "json" {
				docs, _, err := e.sample(cmd.Context())
				if err != nil {
					return err
				}
				items, err := encode(docs)
				if err != nil {
					return err
				}
				return writeJSON(cmd.OutOrStdout(), items)
			}
			return e.show(cmd.Context(), cmd.OutOrStdout(), interval, watch, output == "wide")
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "with an end in this namespace")
	cmd.Flags().BoolVar(&exceptions, "exceptions", false, "only what is not under mutual TLS")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table, wide or json")
	cmd.Flags().DurationVar(&interval, "interval", time.Second, "what rates are measured over; 0 for totals")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on until interrupted")
	return cmd
}

// edges reads some of the edges.
type edges struct {
	*operator
	namespace, service string
	exceptions         bool
}

func (e *edges) sample(ctx context.Context) ([]assay.Edge, time.Time, error) {
	docs, at, err := listAs[assay.Edge](ctx, e.operator, "edges", "", "")
	return slices.DeleteFunc(docs, func(d assay.Edge) bool { return !e.wants(d) }), at, err
}

func (e *edges) wants(d assay.Edge) bool {
	namespace, name, _ := cutKey(d.Service)
	if name == "" {
		name = d.Server.Identity.Account
	}
	switch {
	case e.exceptions && d.Security == assay.MutualTLS:
		return false
	case e.service != "" && e.service != d.Service && e.service != name && e.service != party(d.Server.Identity):
		return false
	}
	return e.namespace == "" || e.namespace == namespace || e.namespace == d.Client.Identity.Namespace || e.namespace == d.Server.Identity.Namespace
}

// cutKey reads "NAMESPACE/NAME".
func cutKey(key string) (namespace, name string, ok bool) {
	namespace, name, ok = strings.Cut(key, "/")
	if !ok {
		return "", key, false
	}
	return namespace, name, true
}

// none says what it means that there is no edge.
func (e *edges) none() string {
	if e.exceptions {
		return "no exceptions"
	}
	return "nobody has talked yet"
}

// show prints one table, or one after the other until the context ends.
func (e *edges) show(ctx context.Context, w io.Writer, interval time.Duration, watch, all bool) error {
	screen := newScreen(w)
	before, from, err := e.sample(ctx)
	if err != nil {
		return err
	}
	for {
		docs, to := before, from
		if interval > 0 {
			if docs, to, err = e.newer(ctx, before, interval); err != nil {
				return ended(ctx, err)
			}
		}
		var picture bytes.Buffer
		if len(docs) == 0 {
			fmt.Fprintln(&picture, e.none())
		} else if err := writeTable(&picture, edgeColumns(interval > 0), edgeRows(before, docs, to.Sub(from)), all, to); err != nil {
			return err
		}
		if err := screen.draw(picture.Bytes()); err != nil || !watch {
			return err
		}
		before, from = docs, to
		if interval == 0 {
			if !sleep(ctx, time.Second) {
				return nil
			}
			if before, from, err = e.sample(ctx); err != nil {
				return ended(ctx, err)
			}
		}
	}
}

// newer waits for an interval and then, for a while, until every edge that was in use
// has been counted again.
func (e *edges) newer(ctx context.Context, before []assay.Edge, interval time.Duration) ([]assay.Edge, time.Time, error) {
	deadline := time.Now().Add(interval + 3*time.Second)
	for wait := interval; ; wait = min(interval, 100*time.Millisecond) {
		if !sleep(ctx, wait) {
			return nil, time.Time{}, ctx.Err()
		}
		docs, at, err := e.sample(ctx)
		if err != nil || time.Now().After(deadline) || countedAgain(before, docs) {
			return docs, at, err
		}
	}
}

// inUse is how long ago an edge was used that is expected to be used again.
const inUse = 2 * time.Second

func countedAgain(before, docs []assay.Edge) bool {
	was := make(map[edgeID]time.Time, len(before))
	for _, e := range before {
		if e.Counted.Sub(e.LastSeen) < inUse {
			was[idOf(e)] = e.Counted
		}
	}
	for _, e := range docs {
		if old, ok := was[idOf(e)]; ok && !e.Counted.After(old) {
			return false
		}
	}
	return true
}

// edgeRow is an edge and its rate.
type edgeRow struct {
	assay.Edge
	rps float64
}

// edgeID is what two edges differ in.
type edgeID struct {
	client, server assay.Party
	service        string
	port           uint16
	protocol       assay.Protocol
	security       assay.Security
	reason         string
	remote, by     string
}

func idOf(e assay.Edge) edgeID {
	return edgeID{e.Client, e.Server, e.Service, e.Port, e.Protocol, e.Security, e.Reason, e.Remote, e.RemoteBy}
}

func edgeRows(before, docs []assay.Edge, span time.Duration) []edgeRow {
	was := make(map[edgeID]assay.Edge, len(before))
	for _, e := range before {
		was[idOf(e)] = e
	}
	rows := make([]edgeRow, len(docs))
	for i, e := range docs {
		rows[i].Edge = e
		old := was[idOf(e)]
		// The time between the two counts, not between the two looks at them.
		between := span
		if d := e.Counted.Sub(old.Counted); !old.Counted.IsZero() && d > 0 {
			between = d
		}
		// A proxy that started again counts from 0.
		if span > 0 && e.Requests >= old.Requests {
			rows[i].rps = float64(e.Requests-old.Requests) / between.Seconds()
		}
	}
	return rows
}

func edgeColumns(rates bool) []column[edgeRow] {
	requests := col("REQUESTS", func(e edgeRow) string { return edgeRequests(e.Edge) })
	if rates {
		requests = col("RPS", func(e edgeRow) string {
			if assay.Beside(e.Reason) {
				return ""
			}
			return rate(e.rps)
		})
	}
	return []column[edgeRow]{
		col("CLIENT", func(e edgeRow) string { return edgeClient(e.Edge) }),
		col("ARTIFACT", func(e edgeRow) string { return e.Client.Artifacts.Short() }),
		col("SERVER", func(e edgeRow) string { return edgeServer(e.Edge) }),
		col("ARTIFACT", func(e edgeRow) string { return e.Server.Artifacts.Short() }),
		col("SERVICE", func(e edgeRow) string { return edgeService(e.Edge) }),
		col("PROTOCOL", func(e edgeRow) string { return string(e.Protocol) }),
		col("SECURITY", func(e edgeRow) string { return edgeSecurity(e.Edge) }),
		requests,
		col("SUCCESS", func(e edgeRow) string {
			return percent(float64(e.Requests-min(e.Failures, e.Requests)), float64(e.Requests))
		}),
		timed("LAST SEEN", func(e edgeRow, now time.Time) string { return age(now, e.LastSeen) }),
		wide("P99", func(e edgeRow) string { return latency(e.Latency.Quantile(0.99)) }),
		wide("OPEN", func(e edgeRow) string { return strconv.FormatInt(e.Open, 10) }),
		wide("UP", func(e edgeRow) string { return size(float64(e.BytesUp)) }),
		wide("DOWN", func(e edgeRow) string { return size(float64(e.BytesDown)) }),
		wide("PACKETS", func(e edgeRow) string { return number(e.PacketsUp + e.PacketsDown) }),
		wide("SEEN BY", func(e edgeRow) string { return join(e.SeenBy, func(d assay.Direction) string { return string(d) }) }),
	}
}
