package demo

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// WriteSummary prints the verdicts as a table and returns whether all are ok.
func WriteSummary(w io.Writer, list []Verdict, took time.Duration) (bool, error) {
	bad := 0
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, v := range list {
		mark := "ok"
		if !v.OK {
			mark = "FAIL"
			bad++
		}
		// A verdict is one line, whatever an error text holds.
		fmt.Fprintf(tw, "%s\t%s\t%s\n", mark, v.Check, strings.Join(strings.Fields(v.Detail), " "))
	}
	tw.Flush()
	switch {
	case len(list) == 0:
		fmt.Fprintf(&b, "\nnothing was checked\n")
	case bad > 0:
		fmt.Fprintf(&b, "\n%d of %d checks failed, in %s\n", bad, len(list), took.Round(100*time.Millisecond))
	default:
		fmt.Fprintf(&b, "\nall %d checks passed, in %s\n", len(list), took.Round(100*time.Millisecond))
	}
	_, err := io.WriteString(w, b.String())
	return bad == 0 && len(list) > 0, err
}
