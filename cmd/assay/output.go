package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"
	"sigs.k8s.io/yaml"

	"assay.dev"
)

// column is one column of a table of T. Wide ones are shown with -o wide.
type column[T any] struct {
	head string
	wide bool
	cell func(doc T, now time.Time) string
}

// writeTable writes rows in columns. now is what ages are counted from.
func writeTable[T any](w io.Writer, columns []column[T], docs []T, wide bool, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := make([]string, 0, len(columns))
	for _, c := range columns {
		if wide || !c.wide {
			row = append(row, c.head)
		}
	}
	writeRow(tw, row)
	for _, doc := range docs {
		row = row[:0]
		for _, c := range columns {
			if wide || !c.wide {
				row = append(row, orDash(oneLine(c.cell(doc, now))))
			}
		}
		writeRow(tw, row)
	}
	return tw.Flush()
}

// writeRow ends a row without the padding that tabwriter gives its last cell.
func writeRow(w io.Writer, row []string) { fmt.Fprintln(w, strings.Join(row, "\t")) }

// oneLine keeps a cell in its line, and control characters of strangers off the
// terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// writeJSON writes documents as one JSON array, always an array: scripts need one
// shape only.
func writeJSON(w io.Writer, items [][]byte) error {
	var b bytes.Buffer
	b.WriteByte('[')
	for i, raw := range items {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(raw)
	}
	b.WriteByte(']')
	var out bytes.Buffer
	if err := json.Indent(&out, b.Bytes(), "", "  "); err != nil {
		return &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err}
	}
	out.WriteByte('\n')
	_, err := out.WriteTo(w)
	return err
}

// writeYAML writes the same documents as YAML, one after the other.
func writeYAML(w io.Writer, items [][]byte) error {
	for i, raw := range items {
		text, err := yaml.JSONToYAML(raw)
		if err != nil {
			return &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err}
		}
		if i > 0 {
			text = append([]byte("---\n"), text...)
		}
		if _, err := w.Write(text); err != nil {
			return err
		}
	}
	return nil
}

// encode is for documents that a command has filtered.
func encode[T any](docs []T) ([][]byte, error) {
	items := make([][]byte, len(docs))
	for i, d := range docs {
		var err error
		if items[i], err = json.Marshal(d); err != nil {
			return nil, err
		}
	}
	return items, nil
}

// checkFormat refuses an output that a command does not have.
func checkFormat(format string, known ...string) error {
	for _, k := range known {
		if format == k {
			return nil
		}
	}
	return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: fmt.Errorf("-o %s", format), Remedy: "want one of " + strings.Join(known, ", ")}
}

// age says how long ago t was.
func age(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return brief(now.Sub(t))
}

// until says when t will be, or that it was.
func until(now, t time.Time) string {
	switch d := t.Sub(now); {
	case t.IsZero():
		return ""
	case d <= 0:
		return "expired " + brief(-d) + " ago"
	default:
		return "in " + brief(d)
	}
}

// brief writes a duration in its largest unit, two while that is small.
func brief(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 10*time.Minute && d%time.Minute >= time.Second:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 10*time.Hour && d%time.Hour >= time.Minute:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// latency writes a bound of a histogram.
func latency(d time.Duration) string {
	switch {
	case d == 0:
		return ""
	case d < time.Millisecond:
		return fmt.Sprintf("%dus", d.Microseconds())
	case d < 10*time.Millisecond:
		return strconv.FormatFloat(float64(d)/1e6, 'f', 1, 64) + "ms"
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	}
	return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + "s"
}

// size writes bytes, or bytes per second, in three digits.
func size(n float64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	i := 0
	for n >= 999.5 && i < len(units)-1 {
		n /= 1000
		i++
	}
	if i == 0 || n >= 99.5 {
		return strconv.FormatFloat(n, 'f', 0, 64) + units[i]
	}
	return strconv.FormatFloat(n, 'f', 1, 64) + units[i]
}

// percent writes a share; it says 100 % and 0 % only when that is all or nothing.
func percent(part, whole float64) string {
	if whole == 0 {
		return ""
	}
	p := 100 * part / whole
	s := strconv.FormatFloat(p, 'f', 2, 64)
	switch {
	case part == whole:
		s = "100"
	case part == 0:
		s = "0"
	case s == "100.00":
		s = "99.99"
	case s == "0.00":
		s = "0.01"
	}
	return s + "%"
}

// rate writes events per second.
func rate(r float64) string {
	if r > 0 && r < 10 {
		return strconv.FormatFloat(r, 'f', 1, 64)
	}
	return strconv.FormatFloat(r, 'f', 0, 64)
}

// party writes one end of an edge.
func party(id assay.Identity) string {
	if id.IsZero() {
		return "(outside)"
	}
	return id.Namespace + "/" + id.Account
}

// screen redraws a live table: in place on a terminal, one after the other else.
type screen struct {
	w        io.Writer
	terminal bool
	drawn    bool
}

func newScreen(w io.Writer) *screen {
	f, ok := w.(*os.File)
	return &screen{w: w, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// draw shows one picture.
func (s *screen) draw(picture []byte) error {
	switch {
	case s.terminal:
		picture = append([]byte("\x1b[H\x1b[2J"), picture...) // ECMA-48: cursor home, erase display
	case s.drawn:
		picture = append([]byte("\n"), picture...)
	}
	s.drawn = true
	_, err := s.w.Write(picture)
	return err
}

var errNoInterval = errors.New("an interval must be longer than 100 ms, or 0 for totals")

func checkInterval(d time.Duration) error {
	if d != 0 && d < 100*time.Millisecond {
		return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: errNoInterval}
	}
	return nil
}
