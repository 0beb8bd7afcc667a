package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

func describeCommand() *cobra.Command {
	var conn connection
	var namespace string
	cmd := &cobra.Command{
		Use:   "describe KIND NAME",
		Short: "Show everything about one thing",
		Long: `Show everything about one thing: for a service its ports, endpoints, numbers and who
talks to it; for a workload what it runs, its certificate and its edges; for a route
its conditions at each parent; for other kinds their whole document. NAME may be written NAMESPACE/NAME.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := findKind(args[0])
			if err != nil {
				return err
			}
			name := args[1]
			if namespace, name, err = splitName(namespace, name); err != nil {
				return err
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			items, at, err := o.list(cmd.Context(), k.list, namespace, name)
			if err != nil {
				return err
			}
			if len(items) == 0 {
				return notFound(k, namespace, name)
			}
			var out bytes.Buffer
			switch k.list {
			case "services":
				err = describeEach(cmd.Context(), &out, o, items, at, describeService)
			case "workloads":
				err = describeEach(cmd.Context(), &out, o, items, at, describeWorkload)
			case "httproutes", "grpcroutes", "tlsroutes":
				err = describeRoutes(&out, items, at)
			default:
				err = writeYAML(&out, items)
			}
			if err != nil {
				return err
			}
			_, err = out.WriteTo(cmd.OutOrStdout())
			return err
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "of this namespace only")
	return cmd
}

// surroundings is what is shown beside the thing itself.
type surroundings struct {
	at      time.Time
	edges   []assay.Edge
	signals []api.SignalsView
	certs   []api.CertificateView
}

func describeEach[T any](ctx context.Context, w io.Writer, o *operator, items [][]byte, at time.Time, describe func(io.Writer, T, surroundings) error) error {
	docs, err := decode[T](items)
	if err != nil {
		return err
	}
	s := surroundings{at: at}
	if s.edges, _, err = listAs[assay.Edge](ctx, o, "edges", "", ""); err != nil {
		return err
	}
	if s.signals, _, err = listAs[api.SignalsView](ctx, o, "signals", "", ""); err != nil {
		return err
	}
	if s.certs, _, err = listAs[api.CertificateView](ctx, o, "certificates", "", ""); err != nil {
		return err
	}
	for i, d := range docs {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := describe(w, d, s); err != nil {
			return err
		}
	}
	return nil
}

func describeRoutes(w io.Writer, items [][]byte, at time.Time) error {
	docs, err := decode[api.ObjectView](items)
	if err != nil {
		return err
	}
	for i, d := range docs {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := describeRoute(w, d, at); err != nil {
			return err
		}
	}
	return nil
}

// field is one "name: value" of a description.
type field struct{ name, value string }

func writeFields(w io.Writer, fields []field) {
	longest := 0
	for _, f := range fields {
		longest = max(longest, len(f.name))
	}
	for _, f := range fields {
		fmt.Fprintf(w, "%-*s %s\n", longest+1, f.name+":", orDash(oneLine(f.value)))
	}
}

// section writes a table under a heading, moved to the right.
func section[T any](w io.Writer, head string, columns []column[T], docs []T, now time.Time) error {
	if len(docs) == 0 {
		fmt.Fprintf(w, "%s: none\n", head)
		return nil
	}
	var table bytes.Buffer
	if err := writeTable(&table, columns, docs, false, now); err != nil {
		return err
	}
	fmt.Fprintf(w, "%s:\n", head)
	for line := range strings.Lines(table.String()) {
		fmt.Fprint(w, "  "+line)
	}
	return nil
}

func describeService(w io.Writer, s api.ServiceView, around surroundings) error {
	source := "follows from running workloads"
	if s.Declared {
		source = "was declared"
	}
	addresses := join(s.VIPs, netip.Addr.String)
	switch {
	case s.Headless:
		addresses = "headless: its name resolves to its endpoints"
	case s.ExternalName != "":
		addresses = "none: it is another name of " + s.ExternalName
	case len(s.Externals) > 0:
		addresses += ", from outside " + join(s.Externals, netip.Addr.String)
	}
	fields := []field{{"Service", s.Key()}, {"Source", source}, {"Addresses", addresses}}
	if s.Affinity > 0 {
		fields = append(fields, field{"Affinity", fmt.Sprintf("a client stays at one endpoint, until %v after it used it last", s.Affinity)})
	}
	if s.Local {
		fields = append(fields, field{"Local", "clients are sent to endpoints of their own host alone"})
	}
	for _, n := range s.Notes {
		fields = append(fields, field{"Note", n})
	}
	writeFields(w, fields)

	type portRow struct {
		assay.Port
		ready int
	}
	ports := make([]portRow, len(s.Ports))
	for i, p := range s.Ports {
		ports[i].Port = p
		if i < len(s.Ready) {
			ports[i].ready = s.Ready[i]
		}
	}
	err := section(w, "Ports", []column[portRow]{
		col("PORT", func(p portRow) string { return portNumber(p.Port.Port) }),
		col("NAME", func(p portRow) string { return p.Name }),
		col("PROTOCOL", func(p portRow) string {
			if p.Protocol == assay.Detect {
				return "detected"
			}
			return string(p.Protocol)
		}),
		col("READY", func(p portRow) string { return fmt.Sprintf("%d/%d", p.ready, len(s.Endpoints)) }),
	}, ports, around.at)
	if err != nil {
		return err
	}
	err = section(w, "Endpoints", []column[assay.Endpoint]{
		col("WORKLOAD", func(e assay.Endpoint) string { return e.Workload }),
		col("IDENTITY", func(e assay.Endpoint) string { return cmp.Or(e.Identity.String(), "not meshed") }),
		col("ADDRESSES", func(e assay.Endpoint) string { return join(e.Addrs, netip.Addr.String) }),
		col("TARGETS", func(e assay.Endpoint) string {
			return join(e.Targets, func(p uint16) string {
				if p == 0 {
					return "not ready"
				}
				return portNumber(p)
			})
		}),
	}, s.Endpoints, around.at)
	if err != nil {
		return err
	}
	if err := section(w, "Signals since the proxies started", statColumns(true)[1:], serviceTotals(around.signals, s.Namespace, s.Name), around.at); err != nil {
		return err
	}
	if err := describeProtection(w, s.Key(), around); err != nil {
		return err
	}
	to := slices.DeleteFunc(slices.Clone(around.edges), func(e assay.Edge) bool { return e.Service != s.Key() })
	return section(w, "Clients", edgeColumns(false), edgeRows(nil, to, 0), around.at)
}

func describeWorkload(w io.Writer, d api.WorkloadView, around surroundings) error {
	ready := "yes"
	if !d.Ready {
		ready = "no: " + d.NotReady
	}
	var labels []string
	for k, v := range d.Labels {
		labels = append(labels, k+"="+v)
	}
	slices.Sort(labels)
	writeFields(w, []field{
		{"Workload", d.ID}, {"Name", d.Namespace + "/" + d.Name}, {"Service", d.Service}, {"Host", d.Host},
		{"Identity", d.Identity.String()}, {"Ready", ready}, {"Addresses", join(d.Addrs, netip.Addr.String)},
		{"Labels", strings.Join(labels, ",")}, {"Declared ports", join(d.Ports, portNumber)}, {"Listening", join(d.Listening, portNumber)},
		{"Meshed since", stamp(d.MeshedSince)}, {"Trusts bundle", number(d.Bundle)},
		{"Artifact set", string(d.ArtifactSet)}, {"Proves nothing", d.Unproven},
	})
	err := section(w, "Artifacts", []column[assay.Artifact]{
		col("KIND", func(a assay.Artifact) string { return string(a.Kind) }),
		col("NAME", func(a assay.Artifact) string { return a.Name }),
		col("DIGEST", func(a assay.Artifact) string { return string(a.Digest) }),
		col("CONFIG", func(a assay.Artifact) string { return a.Config.Short() }),
		col("INDEX", func(a assay.Artifact) string { return a.Index.Short() }),
		col("EVIDENCE", func(a assay.Artifact) string { return cmp.Or(string(a.Evidence), "agent") }),
		col("UNPROVEN", func(a assay.Artifact) string { return a.Unproven }),
	}, d.Artifacts, around.at)
	if err != nil {
		return err
	}
	if err := describeBalance(w, d.ID, around); err != nil {
		return err
	}
	certs := slices.DeleteFunc(slices.Clone(around.certs), func(c api.CertificateView) bool { return c.Workload != d.ID })
	if err := section(w, "Certificates", certificateColumns, certs, around.at); err != nil {
		return err
	}
	self := assay.Party{Identity: d.Identity, Artifacts: d.ArtifactSet}
	edgesOf := func(end func(assay.Edge) assay.Party) []edgeRow {
		return edgeRows(nil, slices.DeleteFunc(slices.Clone(around.edges), func(e assay.Edge) bool { return end(e) != self }), 0)
	}
	if err := section(w, "Calls", edgeColumns(false), edgesOf(func(e assay.Edge) assay.Party { return e.Client }), around.at); err != nil {
		return err
	}
	return section(w, "Is called by", edgeColumns(false), edgesOf(func(e assay.Edge) assay.Party { return e.Server }), around.at)
}

// linkRow is one part of what passed a workload's link.
type linkRow struct {
	part    string
	in, out assay.FrameCount
}

// describeBalance says where the bytes on a workload's link belong.
func describeBalance(w io.Writer, id string, around surroundings) error {
	i := slices.IndexFunc(around.signals, func(s api.SignalsView) bool { return s.Workload == id })
	if i < 0 || around.signals[i].Balance == nil {
		return nil
	}
	b := around.signals[i].Balance
	head := "Link"
	if b.Problem != "" {
		head += " (not counted any more: " + oneLine(b.Problem) + ")"
	}
	rows := []linkRow{{"all", b.In.Link, b.Out.Link}, {"the proxy", b.In.Proxy, b.Out.Proxy}, {"exceptions", b.In.Exceptions, b.Out.Exceptions}}
	var names []string
	for _, m := range []map[string]assay.FrameCount{b.In.Control, b.Out.Control} {
		for name := range m {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		rows = append(rows, linkRow{"control: " + oneLine(name), b.In.Control[name], b.Out.Control[name]})
	}
	err := section(w, head, []column[linkRow]{
		col("PART", func(r linkRow) string { return r.part }),
		col("FRAMES IN", func(r linkRow) string { return number(r.in.Packets) }),
		col("BYTES IN", func(r linkRow) string { return number(r.in.Bytes) }),
		col("FRAMES OUT", func(r linkRow) string { return number(r.out.Packets) }),
		col("BYTES OUT", func(r linkRow) string { return number(r.out.Bytes) }),
	}, rows, around.at)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "  unexplained: %d bytes in, %d bytes out\n", b.In.Unexplained, b.Out.Unexplained)
	return err
}

// unfitRow is an endpoint, or the service whole, with who finds it wanting.
type unfitRow struct {
	assay.Unfit
	by string
}

// describeProtection shows what was decided to protect a service, and which of its
// endpoints its clients' proxies find wanting. What never happened is not shown.
func describeProtection(w io.Writer, service string, around surroundings) error {
	total := map[string]uint64{}
	var unfit []unfitRow
	for _, s := range around.signals {
		for _, d := range s.Counters.Decisions {
			if d.Service == service {
				total[d.Decision] += d.Count
			}
		}
		for _, u := range s.Counters.Unfit {
			if u.Service == service && s.Gone.IsZero() {
				unfit = append(unfit, unfitRow{u, s.Namespace + "/" + s.Name})
			}
		}
	}
	if len(unfit) > 0 {
		err := section(w, "Unfit endpoints", []column[unfitRow]{
			col("WORKLOAD", func(u unfitRow) string { return orDash(u.Workload) }),
			col("ADDRESS", func(u unfitRow) string { return u.Addr }),
			col("EJECTED", func(u unfitRow) string { return yesNo(u.Ejected) }),
			col("WHY", func(u unfitRow) string { return u.Why }),
			col("BY", func(u unfitRow) string { return u.by }),
			timed("PROBED IN", func(u unfitRow, now time.Time) string { return until(now, u.Until) }),
		}, unfit, around.at)
		if err != nil {
			return err
		}
	}
	if len(total) == 0 {
		return nil
	}
	type row struct {
		decision string
		n        uint64
	}
	var rows []row
	for _, name := range slices.Sorted(maps.Keys(total)) {
		rows = append(rows, row{name, total[name]})
	}
	return section(w, "Decisions since the proxies started", []column[row]{
		col("DECISION", func(r row) string { return r.decision }),
		col("COUNT", func(r row) string { return number(r.n) }),
	}, rows, around.at)
}
