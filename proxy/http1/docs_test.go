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
}
