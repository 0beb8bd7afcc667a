package guard

import (
	"math"
	"reflect"
	"testing"
	"time"
)

func TestOver(t *testing.T) {
	rule := &Request{Timeout: time.Second}
	service := &Request{Timeout: time.Minute, TryTimeout: 2 * time.Second, Retry: Retry{Codes: []int{503}, Attempts: 3}}
	if got := rule.Over(service); got.Timeout != time.Second || got.TryTimeout != 2*time.Second || got.Retry.Attempts != 3 {
		t.Errorf("%+v", got)
	}
	own := &Request{Retry: Retry{Attempts: 1}}
	if got := own.Over(service); len(got.Retry.Codes) != 0 || got.Retry.Attempts != 1 {
		t.Errorf("a rule's retry was mixed with the service's: %+v", got)
	}
	if (*Request)(nil).Over(service) != service || rule.Over(nil) != rule || !reflect.DeepEqual(rule, &Request{Timeout: time.Second}) {
		t.Error("nothing over something is something, and neither is changed")
	}
}

func TestExpires(t *testing.T) {
	for _, c := range []struct {
		p          *Request
		wire, want time.Duration
	}{
		{nil, 0, 0},
		{nil, time.Second, 11 * time.Second},
		{&Request{Timeout: -1}, 0, 0},
		{&Request{Timeout: -1}, time.Second, 11 * time.Second},
		{&Request{Timeout: 3 * time.Second}, 0, 13 * time.Second},
		{&Request{Timeout: 3 * time.Second}, time.Second, 11 * time.Second},
		{&Request{Timeout: 3 * time.Second}, time.Minute, 13 * time.Second},
	} {
		if got := c.p.Expires(10*time.Second, c.wire); got != c.want {
			t.Errorf("%+v with %v: %v, want %v", c.p, c.wire, got, c.want)
		}
	}
}

func TestGRPCTimeout(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"1n": 1, "0m": 0, "100m": 100 * time.Millisecond, "99999999H": math.MaxInt64, "00000001S": time.Second,
		"2M": 2 * time.Minute, "3H": 3 * time.Hour, "7u": 7 * time.Microsecond,
	} {
		if got, ok := ParseGRPCTimeout(text); !ok || got != want {
			t.Errorf("%s: %v %v, want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "1", "n", "-1n", "+1n", "1.5S", "1s", "123456789n", "1 m", "1mm"} {
		if got, ok := ParseGRPCTimeout(text); ok {
			t.Errorf("%q was read as %v", text, got)
		}
	}
	for d, want := range map[time.Duration]string{
		-1: "0n", 0: "0n", 1: "1n", 99_999_999: "99999999n", 100_000_001: "100001u", time.Second: "1000000u",
		100 * time.Second: "100000m", 100_000 * time.Second: "100000S", math.MaxInt64: "2562048H",
	} {
		got := string(AppendGRPCTimeout(nil, d))
		if got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func FuzzGRPCTimeout(f *testing.F) {
	f.Add("100m")
	f.Add("99999999H")
	f.Fuzz(func(t *testing.T, text string) {
		d, ok := ParseGRPCTimeout(text)
		if !ok {
			return
		}
		again, ok := ParseGRPCTimeout(string(AppendGRPCTimeout(nil, d)))
		if !ok || d < 0 || again < d {
			t.Errorf("%q: %v, then %v", text, d, again)
		}
	})
}

func TestAskingAllocatesNothing(t *testing.T) {
	s, p := new(Service), &Request{Timeout: time.Second, Retry: Retry{Codes: []int{503}}}
	if n := testing.AllocsPerRun(100, func() {
		s.Budget.Request()
		p.Expires(1, 0)
		p.TryExpires(1)
		p.HasCode(200)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
