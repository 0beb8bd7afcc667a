package http1

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestDocumentedRefusals holds docs/http1.md against the code.
func TestDocumentedRefusals(t *testing.T) {
	raw, err := os.ReadFile("../../docs/http1.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range Refusals {
		cell := fmt.Sprintf("| %d | `%s` | %s", r.Status, r.Reason, strings.ReplaceAll(r.Section, "section ", ""))
		if !strings.Contains(string(raw), cell) {
			t.Errorf("docs/http1.md has no row with %q", cell)
		}
	}
	for _, f := range []*Failure{failRefused, failOverloaded, failDenied, failLimited, failTimeout, failTryTimeout, failBroken, failBadRequest, failUnknown, failDispatch, failUnreachable, failAppReset, failStalled} {
		saw := fmt.Sprint(f.Status)
		if f.Reset {
			saw = "reset"
		}
		if row := fmt.Sprintf("| %s | `%s` |", saw, f.Reason); !strings.Contains(strings.ReplaceAll(string(raw), "503, or what the refusal says | `unavailable`, or the refusal's own", "503 | `unavailable`"), row) {
			t.Errorf("docs/http1.md has no row with %q", row)
		}
	}
}

var update = flag.Bool("update", false, "write the table of cases into docs/http1.md")

// TestDocumentedCases holds the table of smuggling cases against the cases that the
// engine is tested with.
func TestDocumentedCases(t *testing.T) {
	documented(t, "cases", caseTable(t, "smuggling-requests")+"### Responses\n\n"+caseTable(t, "smuggling-responses"), nil)
}

// documented holds the part of docs/http1.md between two marks against what the code
// says. skip may say that what is there was made elsewhere.
func documented(t *testing.T, part, want string, skip func(had string) bool) {
	t.Helper()
	begin, end := "<!-- "+part+" -->\n", "<!-- end of "+part+" -->\n"
	const doc = "../../docs/http1.md"
	raw, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), begin)
	got, after, ok2 := strings.Cut(rest, end)
	switch {
	case !ok || !ok2:
		t.Fatalf("%s has no place for %s", doc, part)
	case got == want:
	case *update:
		if err := os.WriteFile(doc, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	case skip != nil && skip(got):
		t.Skip("the table is of another version")
	default:
		t.Fatalf("%s differs from what the code says; -update writes it:\n%s", doc, want)
	}
}

func caseTable(t *testing.T, file string) string {
	var b strings.Builder
	group := ""
	for _, m := range messages(t, file) {
		if m.group != group {
			if group != "" {
				b.WriteString("\n")
			}
			group = m.group
			fmt.Fprintf(&b, "| %s | why it is tried, or what it means | rule |\n|---|---|---|\n", group)
		}
		f := strings.Fields(m.want)
		rule := m.want
		switch f[0] {
		case "refused", "cut":
			rule = strings.Join(f[:len(f)-1], " ") + " `" + f[len(f)-1] + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", m.name, m.why, rule)
	}
	return b.String() + "\n"
}
