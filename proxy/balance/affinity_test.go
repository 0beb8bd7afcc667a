package balance

import (
	"testing"
	"time"
)

func TestAffinity(t *testing.T) {
	s, g, now := group(5, 0, nil)
	s.Keep(time.Minute, nil)
	first := s.Pick(now, nil)
	for range 200 {
		now = now.Add(30 * time.Second) // its time begins anew with every use
		if s.Pick(now, nil) != first || s.PickConnection(now, nil) != first {
			t.Fatal("it went elsewhere")
		}
	}
	t.Run("expires", func(t *testing.T) {
		count := map[*Endpoint]bool{}
		for range 200 {
			now = now.Add(61 * time.Second)
			count[s.Pick(now, nil)] = true
		}
		if len(count) < 3 {
			t.Errorf("after its time only %d of 5 were chosen", len(count))
		}
	})
	t.Run("outlives its set", func(t *testing.T) {
		kept := s.Pick(now, nil)
		next := New(s, wants(9), nil)
		next.Keep(time.Minute, s)
		g.Consist(now, next)
		for range 50 {
			if next.Pick(now, nil) != kept {
				t.Fatal("a larger set has it elsewhere")
			}
		}
		var others []Want
		for _, w := range wants(9) {
			if w.Addr != kept.Addr {
				others = append(others, w)
			}
		}
		gone := New(next, others, nil)
		gone.Keep(time.Minute, next)
		g.Consist(now, gone)
		moved := gone.Pick(now, nil)
		if moved == kept || moved == nil {
			t.Fatal("it is kept at an endpoint that is gone")
		}
		// Where it came back, the client has moved.
		back := New(gone, wants(9), nil)
		back.Keep(time.Minute, gone)
		g.Consist(now, back)
		for range 50 {
			if back.Pick(now, nil) != moved {
				t.Fatal("it did not stay where it moved to")
			}
		}
		off := New(back, wants(9), nil)
		off.Keep(0, back)
		g.Consist(now, off)
		if len(picked(off, 500, now)) != 9 {
			t.Error("without affinity not all are used")
		}
	})
}

func TestAffinityIsLeft(t *testing.T) {
	s, _, now := group(4, 0, nil)
	s.Keep(time.Hour, nil)
	first := s.Pick(now, nil)
	for range 50 { // much to do is no reason
		first.Begin()
	}
	first.Overloaded(now)
	if s.Pick(now, nil) != first {
		t.Fatal("a busy endpoint was left")
	}
	second := s.Pick(now, []*Endpoint{first})
	if second == first || second == nil {
		t.Fatal("a retry went to the endpoint that was tried")
	}
	for range 50 {
		if s.Pick(now, nil) != second {
			t.Fatal("it went back to the endpoint that did not take it")
		}
	}
	fail(second, 5, now)
	if third := s.Pick(now, nil); third == second || third != s.Pick(now, nil) {
		t.Error("it stays at an ejected endpoint, or at none")
	}
}

// TestAffinityTogether: connections that begin at once are one client's.
func TestAffinityTogether(t *testing.T) {
	for range 200 {
		s := New(nil, wants(8), nil)
		s.Keep(time.Hour, nil)
		chosen := make(chan *Endpoint, 4)
		for range 4 {
			go func() { chosen <- s.Pick(time.Now(), nil) }()
		}
		first := <-chosen
		for range 3 {
			if <-chosen != first {
				t.Fatal("two endpoints for one client")
			}
		}
	}
}

func TestAffinityAllocatesNothing(t *testing.T) {
	s := New(nil, wants(8), nil)
	s.Keep(time.Hour, nil)
	now := time.Now()
	s.Pick(now, nil)
	if n := testing.AllocsPerRun(1000, func() { s.Pick(now, nil) }); n != 0 {
		t.Errorf("%v allocations per pick", n)
	}
}
