package assay

import "testing"

// Rows of W3C Trace Context, section 3.2.
func TestParseTraceParent(t *testing.T) {
	const trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	for _, c := range []struct {
		in          string
		ok, sampled bool
	}{
		{"00-" + trace + "-" + span + "-01", true, true},
		{"00-" + trace + "-" + span + "-00", true, false},
		{"00-" + trace + "-" + span + "-fe", true, false},
		{"00-" + trace + "-" + span + "-ff", true, true},
		{"cc-" + trace + "-" + span + "-01-what.the.future.brings", true, true},
		{"cc-" + trace + "-" + span + "-01", true, true},
		{"cc-" + trace + "-" + span + "-01.x", false, false},
		{"ff-" + trace + "-" + span + "-01", false, false},
		{"00-" + trace + "-" + span + "-01-more", false, false},
		{"00-00000000000000000000000000000000-" + span + "-01", false, false},
		{"00-" + trace + "-0000000000000000-01", false, false},
		{"00-4BF92F3577B34DA6A3CE929D0E0E4736-" + span + "-01", false, false},
		{"00-" + trace + "-" + span + "-0x", false, false},
		{"00_" + trace + "-" + span + "-01", false, false},
		{"", false, false},
	} {
		got, err := ParseTraceParent(c.in)
		if (err == nil) != c.ok || got.Sampled != c.sampled || c.ok && (got.Trace != trace || got.Span != span) {
			t.Errorf("%q: %+v, %v", c.in, got, err)
		}
	}
}
