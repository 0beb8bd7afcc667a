package guard

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// play runs the transcripts testdata/NAME*.txt: each line is a time, an event and its
// arguments, and what do answers to it must be what follows "=>". Lines that begin
// with # say what is shown; an empty line begins anew.
func play(t *testing.T, name string, begin func() func(now time.Duration, event string, args []string) string) {
	t.Helper()
	files, err := filepath.Glob("testdata/" + name + "*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		do := begin()
		for i, line := range strings.Split(string(text), "\n") {
			switch {
			case strings.HasPrefix(line, "#"):
				continue
			case strings.TrimSpace(line) == "":
				do = begin()
				continue
			}
			said, want, _ := strings.Cut(line, "=>")
			fields := strings.Fields(said)
			now, err := time.ParseDuration(fields[0])
			if err != nil {
				t.Fatalf("%s:%d: %v", file, i+1, err)
			}
			if got := do(now, fields[1], fields[2:]); got != strings.TrimSpace(want) {
				t.Errorf("%s:%d: %s => %s", file, i+1, strings.TrimSpace(said), got)
			}
		}
	}
}

func number(args []string, i int) int {
	if i >= len(args) {
		return 1
	}
	n, err := strconv.Atoi(args[i])
	if err != nil {
		panic(err)
	}
	return n
}

func length(args []string, i int) time.Duration {
	d, err := time.ParseDuration(args[i])
	if err != nil {
		panic(err)
	}
	return d
}

func TestBudgetTranscripts(t *testing.T) {
	play(t, "budget", func() func(time.Duration, string, []string) string {
		b := new(Budget)
		return func(now time.Duration, event string, args []string) string {
			switch event {
			case "limits": // percent, per second, interval
				b.Set(Budgeted{Percent: number(args, 0), MinPerSecond: number(args, 1), Interval: length(args, 2)})
				return ""
			case "requests":
				for range number(args, 0) {
					b.Request()
				}
				return ""
			case "take":
				taken := 0
				for range number(args, 0) {
					if b.Take(now) {
						taken++
					}
				}
				return strconv.Itoa(taken)
			case "back":
				b.giveBack()
				return ""
			}
			return "no such event"
		}
	})
}

func TestRetryTranscripts(t *testing.T) {
	play(t, "retry", func() func(time.Duration, string, []string) string {
		p, s := (*Request)(nil), &Service{Counts: new(Counts)}
		causes := map[string]Cause{"unread": Unread, "broken": Broken, "timed-out": TimedOut, "nothing": 0}
		return func(now time.Duration, event string, args []string) string {
			switch event {
			case "policy":
				p = new(Request)
				for _, a := range args {
					name, value, _ := strings.Cut(a, "=")
					switch name {
					case "attempts":
						p.Retry.Attempts = number([]string{value}, 0)
					case "code":
						p.Retry.Codes = append(p.Retry.Codes, number([]string{value}, 0))
					case "backoff":
						p.Retry.Backoff = length([]string{value}, 0)
					case "repeatable":
						p.Retry.Repeatable = true
					}
				}
				return ""
			case "budget":
				s.Budget.Set(Budgeted{Percent: -1, MinPerSecond: number(args, 0)})
				return ""
			case "counts":
				var list []string
				s.Counts.Each(func(name string, n uint64) { list = append(list, fmt.Sprint(name, "=", n)) })
				return strings.Join(list, " ")
			}
			// attempt NUMBER CAUSE|STATUS METHOD [expires=D]
			a := Attempt{Number: number(args, 0), Idempotent: args[2] == "GET"}
			if c, ok := causes[args[1]]; ok {
				a.Cause = c
			} else {
				a.Cause, a.Status = Answered, number(args, 1)
			}
			if len(args) > 3 {
				a.Expires = length([]string{strings.TrimPrefix(args[3], "expires=")}, 0)
			}
			low, high := time.Duration(1<<62), time.Duration(-1)
			for range 2000 { // whatever the dice say
				wait, ok := (*Service)(nil).Retry(p, a, now)
				if !ok {
					continue
				}
				low, high = min(low, wait), max(high, wait)
			}
			if _, ok := s.Retry(p, a, now); !ok {
				return "no"
			}
			if high > 0 {
				if high < low+low/4 {
					return fmt.Sprintf("waits of %v to %v are not jittered", low, high)
				}
				return fmt.Sprintf("yes, in %v and up to half more", low.Truncate(25*time.Millisecond))
			}
			return "yes"
		}
	})
}
