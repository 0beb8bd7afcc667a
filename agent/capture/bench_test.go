package capture_test

import "testing"

// BenchmarkRefused is what reading the counters costs: it is done every few seconds for
// each workload.
func BenchmarkRefused(b *testing.B) {
	s := setup(b)
	if err := s.capture.Install(s.rules, nil); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.capture.Refused(); err != nil {
			b.Fatal(err)
		}
	}
}
