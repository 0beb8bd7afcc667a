package layered

import (
	"maps"
	"math/rand/v2"
	"testing"
)

// TestMap: a map is what an ordinary one would be, and stays it whatever its successors are.
func TestMap(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	type moment struct {
		is   Map[int, int]
		want map[int]int
	}
	var now moment
	now.want = map[int]int{}
	var old []moment
	same := func(m moment) {
		t.Helper()
		if got := maps.Collect(m.is.All()); !maps.Equal(got, m.want) || m.is.Len() != len(m.want) {
			t.Fatalf("%d of %d keys: %v, want %v", m.is.Len(), len(m.want), got, m.want)
		}
		for key := range 70 {
			v, ok := m.is.Get(key)
			if w, there := m.want[key]; v != w || ok != there || m.is.At(key) != w {
				t.Fatalf("%d is %d, %v; want %d, %v", key, v, ok, w, there)
			}
		}
	}
	for step := range 2000 {
		e, want := now.is.Edit(), maps.Clone(now.want)
		for range random.IntN(12) {
			key := random.IntN(60)
			if random.IntN(3) == 0 {
				e.Delete(key)
				delete(want, key)
			} else {
				e.Set(key, step)
				want[key] = step
			}
			if v, ok := e.Get(key); ok != (want[key] == step && ok) || ok && v != step {
				t.Fatalf("an edit does not see what it did: %d, %v", v, ok)
			}
		}
		now = moment{e.Map(), want}
		same(now)
		if step%100 == 0 {
			old = append(old, now)
		}
	}
	for _, m := range old {
		same(m)
	}
}

// TestEmptied: what is gone takes no room for ever.
func TestEmptied(t *testing.T) {
	var m Map[int, int]
	for round := range 100 {
		e := m.Edit()
		for i := range 50 {
			e.Set(100*round+i, i)
			e.Delete(100*(round-1) + i)
		}
		m = e.Map()
	}
	if m.Len() != 50 || len(m.base) > 50 || len(m.over) > 50 {
		t.Errorf("%d keys, kept %d and %d", m.Len(), len(m.base), len(m.over))
	}
}

func BenchmarkChange(b *testing.B) {
	var m Map[int, int]
	e := m.Edit()
	for i := range 5000 {
		e.Set(i, i)
	}
	m = e.Map()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		e := m.Edit()
		e.Set(i%5000, i)
		m = e.Map()
		i++
	}
}
