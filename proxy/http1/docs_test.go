package http1

import (
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
