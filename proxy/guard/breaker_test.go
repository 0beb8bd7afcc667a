package guard

import (
	"testing"
	"time"

	"assay.dev"
)

func TestBreakerTranscripts(t *testing.T) {
	play(t, "breaker", func() func(time.Duration, string, []string) string {
		l := (*assay.TrafficPolicy)(nil).WithDefaults().Ejection.BreakerPolicy
		b := new(Breaker)
		return func(now time.Duration, event string, args []string) string {
			change := Same
			switch event {
			case "limits": // consecutive failed% slower-than
				l.ConsecutiveFailures, l.FailurePercent, l.SlowerThan = number(args, 0), number(args, 1), length(args, 2)
				return ""
			case "fails":
				for range number(args, 0) {
					change = max(change, b.Failed(&l, now))
				}
			case "answers": // in TIME [times]
				for range number(args, 1) {
					change = max(change, b.Answered(&l, length(args, 0), now))
				}
			case "probe":
				if b.Probe(&l, now) {
					return "yes"
				}
				return "no"
			}
			return [...]string{"", "opened", "closed"}[change]
		}
	})
}
