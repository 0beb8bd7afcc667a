package http2

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

var codeNames = [...]string{"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
	"REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"}

// TestDocumentedRefusals holds docs/http2.md against the code.
func TestDocumentedRefusals(t *testing.T) {
	raw, err := os.ReadFile("../../docs/http2.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for _, r := range Refusals {
		what := "resets the stream with " + codeNames[r.Code]
		switch {
		case r.Conn:
			what = "ends the connection with " + codeNames[r.Code]
		case r.Status != 0:
			what = fmt.Sprintf("is answered %d", r.Status)
		}
		row := fmt.Sprintf("| %s | `%s` | %s | %s |", r.Text, r.Reason, what, strings.ReplaceAll(r.Section, "section ", ""))
		if !strings.Contains(string(raw), row) {
			t.Errorf("docs/http2.md lacks:\n%s", row)
		}
		rows++
	}
	seen := map[string]bool{}
	for _, r := range Refusals {
		if seen[r.Reason] {
			t.Errorf("reason %s is there twice", r.Reason)
		}
		seen[r.Reason] = true
	}
	for _, f := range failures {
		row := fmt.Sprintf("| %d | %d | `%s` |", f.Status, f.Code, f.Reason)
		if !strings.Contains(string(raw), row) {
			t.Errorf("docs/http2.md lacks a row with %q", row)
		}
	}
	for what, l := range floodLimits {
		row := fmt.Sprintf("| `%s` | %d | %d |", l.refusal.Reason, l.base, l.more)
		if !strings.Contains(string(raw), row) {
			t.Errorf("docs/http2.md lacks a row for flood %d: %q", what, row)
		}
	}
}
