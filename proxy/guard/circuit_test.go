package guard

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

func TestCircuitTranscripts(t *testing.T) {
	play(t, "circuit", func() func(time.Duration, string, []string) string {
		c := &Circuit{Counts: new(Counts)}
		c.Set((*assay.TrafficPolicy)(nil).WithDefaults().Circuit)
		return func(now time.Duration, event string, args []string) string {
			switch event {
			case "opens-after": // consecutive failed% slower-than
				p := assay.TrafficPolicy{Circuit: assay.BreakerPolicy{
					ConsecutiveFailures: number(args, 0), FailurePercent: number(args, 1), SlowerThan: length(args, 2),
				}}
				c.Set(p.WithDefaults().Circuit)
				return ""
			case "fails":
				for range number(args, 0) {
					c.Failed(now)
				}
			case "answers": // in TIME [times]
				for range number(args, 1) {
					c.Answered(length(args, 0), now)
				}
			case "allow": // [times]: what the last one got
				allowed := false
				for range number(args, 0) {
					allowed = c.Allow(now)
				}
				if allowed {
					return "yes"
				}
				return "no"
			case "counts":
				var list []string
				c.Counts.Each(func(name string, n uint64) { list = append(list, fmt.Sprint(name, "=", n)) })
				return strings.Join(list, " ")
			}
			if why, _ := c.Open(); why != "" {
				return "open: " + why
			}
			return ""
		}
	})
}

func TestThrottleTranscripts(t *testing.T) {
	play(t, "throttle", func() func(time.Duration, string, []string) string {
		th := new(Throttle)
		return func(now time.Duration, event string, args []string) string {
			switch event {
			case "refused": // with so many under way
				th.Refused(int64(number(args, 0)), now)
			case "answered": // with so many others under way, asked at TIME [times]
				for range number(args, 2) {
					th.Answered(int64(number(args, 0)), length(args, 1))
				}
			}
			return fmt.Sprint(th.Limit())
		}
	})
}

func TestAskingACircuitAllocatesNothing(t *testing.T) {
	p := (*assay.TrafficPolicy)(nil).WithDefaults()
	s := new(Service)
	s.Set(&p)
	if n := testing.AllocsPerRun(1000, func() {
		s.Circuit.Allow(1)
		s.Circuit.Answered(time.Millisecond, 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
