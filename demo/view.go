package demo

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"assay.dev"
)

// View shows the live edges. On a terminal it redraws one screen; elsewhere it writes
// a line now and then.
type View struct {
	Out      io.Writer
	Terminal bool
	Size     func() (columns, rows int) // of the terminal
	Header   []string                   // what to look at; above the table, or once
	Every    time.Duration              // between lines where there is no terminal

	started time.Time
	printed time.Time
	before  sample
}

// sample is what control told at one time.
type sample struct {
	at        time.Time
	workloads []assay.Workload
	edges     []assay.Edge
	findings  []assay.Finding
	note      string // why there is nothing newer, when control does not answer
}

// Show draws s.
func (v *View) Show(s sample) error {
	if v.started.IsZero() {
		v.started = s.at
		if !v.Terminal {
			if _, err := io.WriteString(v.Out, strings.Join(v.Header, "\n")+"\n"); err != nil {
				return err
			}
		}
	}
	var err error
	switch {
	case v.Terminal:
		columns, rows := v.Size()
		_, err = io.WriteString(v.Out, screen(v.lines(s), columns, rows))
	case v.printed.IsZero() || s.at.Sub(v.printed) >= v.Every:
		v.printed = s.at
		_, err = io.WriteString(v.Out, v.line(s)+"\n")
	default:
		return nil // the rate is over the whole time between two lines
	}
	v.before = s
	return err
}

// screen moves home, writes what fits, and clears the rest. No line is wrapped.
func screen(lines []string, columns, rows int) string {
	if rows > 1 && len(lines) > rows-1 {
		lines = lines[:rows-1]
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for _, l := range lines {
		if r := []rune(l); columns > 0 && len(r) > columns {
			l = string(r[:columns])
		}
		b.WriteString(l + "\x1b[K\r\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// clearScreen is written before the first screen.
const clearScreen = "\x1b[2J"

// row is an edge with its numbers, over all protocols and reasons.
type row struct {
	client, server string
	port           uint16
	protocol       string
	security       string
	rate           float64
	success        float64 // percent; negative: nothing yet
	p50, p99       time.Duration
	open           int64
	artifacts      string
}

// key names an edge across samples.
func key(e *assay.Edge) string {
	return fmt.Sprint(e.Client, e.Server, e.Service, e.Port, e.Protocol, e.Security, e.Reason)
}

// rows computes rates since before. Edges that differ only in protocol or artifacts
// stay apart: that is what a person should see.
func rows(before, now sample) []row {
	past := map[string]uint64{}
	for i := range before.edges {
		past[key(&before.edges[i])] = before.edges[i].Requests
	}
	took := now.at.Sub(before.at).Seconds()
	var list []row
	for i := range now.edges {
		e := &now.edges[i]
		r := row{client: "(outside)", server: "(outside)", port: e.Port, protocol: cmp.Or(string(e.Protocol), "detecting"),
			security: string(e.Security), open: e.Open, success: -1, p50: e.Latency.Quantile(0.5), p99: e.Latency.Quantile(0.99)}
		if !e.Client.Identity.IsZero() {
			r.client = nameOf(e.Client.Identity).String()
		}
		if !e.Server.Identity.IsZero() {
			r.server = nameOf(e.Server.Identity).String()
		}
		if e.Reason != "" {
			r.security += ": " + e.Reason
		}
		if e.Requests > 0 {
			r.success = 100 * float64(e.Requests-min(e.Failures, e.Requests)) / float64(e.Requests)
		}
		if then := past[key(e)]; took > 0 && !before.at.IsZero() && e.Requests > then {
			r.rate = float64(e.Requests-then) / took
		}
		r.artifacts = cmp.Or(e.Client.Artifacts.Short(), "none") + " -> " + cmp.Or(e.Server.Artifacts.Short(), "none")
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.client, b.client), cmp.Compare(a.server, b.server), cmp.Compare(a.port, b.port),
			cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.security, b.security))
	})
	return list
}

// lines is the screen.
func (v *View) lines(s sample) []string {
	out := slices.Clone(v.Header)
	out = append(out, "", fmt.Sprintf("%s  %s", s.at.Sub(v.started).Round(time.Second), v.state(s)), "")
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "CLIENT\tSERVER\tENCRYPTED\tREQ/S\tSUCCESS\tP50\tP99\tPROTOCOL\tOPEN\tARTIFACTS")
	for _, r := range rows(v.before, s) {
		success := "-"
		if r.success >= 0 {
			success = fmt.Sprintf("%.2f %%", r.success)
		}
		fmt.Fprintf(tw, "%s\t%s:%d\t%s\t%.1f\t%s\t%s\t%s\t%s\t%d\t%s\n", r.client, r.server, r.port, r.security, r.rate, success,
			latency(r.p50), latency(r.p99), r.protocol, r.open, r.artifacts)
	}
	tw.Flush()
	for l := range strings.Lines(b.String()) {
		out = append(out, strings.TrimRight(l, " \n"))
	}
	if n := len(s.findings); n > 0 {
		out = append(out, "", "What a person should look at:")
		for _, f := range s.findings[max(0, n-5):] {
			out = append(out, "  "+sentence(f))
		}
	}
	return out
}

// sentence is a finding in one line.
func sentence(f assay.Finding) string {
	s := fmt.Sprintf("%s %s: %s", f.Time.Local().Format(time.TimeOnly), f.Subject, f.Detail)
	if f.Remedy != "" {
		s += " (" + f.Remedy + ")"
	}
	return s
}

func latency(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d/time.Millisecond)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// state is the whole mesh in a few words.
func (v *View) state(s sample) string {
	meshed, unproven, encrypted := 0, 0, 0
	for i := range s.workloads {
		if !s.workloads[i].MeshedSince.IsZero() {
			meshed++
		}
		if s.workloads[i].Artifacts.Unproven() != "" {
			unproven++
		}
	}
	for i := range s.edges {
		if s.edges[i].Security == assay.MutualTLS {
			encrypted++
		}
	}
	text := fmt.Sprintf("%d of %d workloads meshed", meshed, len(s.workloads))
	if unproven > 0 {
		text += fmt.Sprintf(" (%d unproven)", unproven)
	}
	text += fmt.Sprintf(", %d of %d edges under mutual TLS", encrypted, len(s.edges))
	if n := len(s.findings); n > 0 {
		text += fmt.Sprintf(", findings: %d", n)
	}
	if s.note != "" {
		text += "; " + s.note
	}
	return text
}

// line is the screen for who has no terminal.
func (v *View) line(s sample) string {
	var rate float64
	var requests, failures uint64
	for _, r := range rows(v.before, s) {
		rate += r.rate
	}
	for i := range s.edges {
		requests += s.edges[i].Requests
		failures += s.edges[i].Failures
	}
	success := "-"
	if requests > 0 {
		success = fmt.Sprintf("%.2f %%", 100*float64(requests-min(failures, requests))/float64(requests))
	}
	return fmt.Sprintf("%s  %s, %.0f requests/s, success %s", s.at.Sub(v.started).Round(time.Second), v.state(s), rate, success)
}
