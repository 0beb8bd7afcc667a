package balance

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func wants(n int) []Want {
	list := make([]Want, n)
	for i := range list {
		list[i] = Want{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 181, 0, byte(i + 1)}), 8080), Workload: fmt.Sprint(i)}
	}
	return list
}

func TestSlowEndpointGetsLess(t *testing.T) {
	s := New(nil, wants(3), nil)
	now := time.Unix(1_700_000_000, 0)
	count := map[*Endpoint]int{}
	for range 3000 {
		now = now.Add(time.Millisecond)
		e := s.Pick(now, nil)
		count[e]++
		took := time.Millisecond
		if e == s.list[1] {
			took = 50 * time.Millisecond
		}
		e.Answered(took, now)
	}
	// It wins only while its bad mark decays: far below its third.
	if got := count[s.list[1]]; got > 300 || got == 0 {
		t.Errorf("the slow endpoint got %d of 3000", got)
	}
}

func TestBusyEndpointGetsLess(t *testing.T) {
	s := New(nil, wants(2), nil)
	now := time.Unix(1_700_000_000, 0)
	for _, e := range s.list {
		e.Answered(time.Millisecond, now)
	}
	for range 5 {
		s.list[0].Begin()
	}
	for range 100 {
		if s.Pick(now, nil) == s.list[0] {
			t.Fatal("chose the one with five in flight over the idle one")
		}
	}
}

func TestFastEndpointsShare(t *testing.T) {
	s := New(nil, wants(2), nil)
	now := time.Unix(1_700_000_000, 0)
	count := map[*Endpoint]int{}
	for i := range 1000 {
		e := s.Pick(now, nil)
		count[e]++
		e.Answered(time.Duration(100+i%7*100)*time.Microsecond, now)
	}
	if n := count[s.list[0]]; n < 350 || n > 650 {
		t.Errorf("two equally fast endpoints got %d and %d of 1000", n, 1000-n)
	}
}

func TestFailedIsForgivenInTime(t *testing.T) {
	s := New(nil, wants(2), nil)
	now := time.Unix(1_700_000_000, 0)
	for _, e := range s.list {
		e.Answered(time.Millisecond, now)
	}
	s.list[0].Failed(now)
	for range 100 {
		if s.Pick(now, nil) == s.list[0] {
			t.Fatal("chose the failed endpoint")
		}
	}
	now = now.Add(2 * time.Minute)
	s.list[1].Answered(time.Millisecond, now)
	chosen := 0
	for range 100 {
		if s.Pick(now, nil) == s.list[0] {
			chosen++
		}
	}
	if chosen == 0 {
		t.Error("an endpoint that failed two minutes ago is never tried again")
	}
}

func TestPickSkipsTried(t *testing.T) {
	s := New(nil, wants(4), nil)
	now := time.Unix(1_700_000_000, 0)
	var tried []*Endpoint
	for range 4 {
		e := s.Pick(now, tried)
		if e == nil || contains(tried, e) {
			t.Fatalf("Pick after %d = %v", len(tried), e)
		}
		tried = append(tried, e)
	}
	if e := s.Pick(now, tried); e != nil {
		t.Errorf("Pick with all tried = %v", e.Addr)
	}
	var none *Set
	if none.Pick(now, nil) != nil || none.Len() != 0 {
		t.Error("a nil set has endpoints")
	}
}

func TestNewKeepsWhatItKnows(t *testing.T) {
	made := 0
	value := func(Want) any { made++; return made }
	s := New(nil, wants(3), value)
	s.list[2].Begin()
	next := New(s, wants(4)[1:], value)
	if made != 4 || next.Len() != 3 {
		t.Fatalf("made %d values for %d endpoints", made, next.Len())
	}
	if next.list[1] != s.list[2] || next.list[1].InFlight() != 1 {
		t.Error("an endpoint in both sets was made anew")
	}
}

func TestPickAllocatesNothing(t *testing.T) {
	s := New(nil, wants(8), nil)
	now := time.Now()
	if n := testing.AllocsPerRun(1000, func() {
		e := s.Pick(now, nil)
		e.Begin()
		e.Answered(time.Millisecond, now)
		e.Done()
	}); n != 0 {
		t.Errorf("%v allocations per pick", n)
	}
}

func BenchmarkPick(b *testing.B) {
	s := New(nil, wants(8), nil)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		e := s.Pick(now, nil)
		e.Begin()
		e.Answered(time.Millisecond, now)
		e.Done()
	}
}
