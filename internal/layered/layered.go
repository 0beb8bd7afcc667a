// Package layered has a map that never changes and whose successor is cheap: a base that
// successors share, and above it what has changed since it was made. Whoever holds one may
// read it for as long as it likes, from any goroutine, while others go on.
//
// A change costs about the square root of the size, and reading looks into two maps.
package layered

import (
	"iter"
	"maps"
)

// Map is one. The zero value is empty.
type Map[K comparable, V any] struct {
	base map[K]V
	over map[K]change[V] // against the base
	size int
}

type change[V any] struct {
	value V
	gone  bool
}

// Get returns the value of a key, and whether there is one.
func (m *Map[K, V]) Get(key K) (V, bool) {
	if len(m.over) > 0 {
		if c, ok := m.over[key]; ok {
			return c.value, !c.gone
		}
	}
	v, ok := m.base[key]
	return v, ok
}

// At returns the value of a key, or the zero value.
func (m *Map[K, V]) At(key K) V {
	v, _ := m.Get(key)
	return v
}

// Len returns the number of keys.
func (m *Map[K, V]) Len() int { return m.size }

// All goes over everything, in no order.
func (m *Map[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for key, c := range m.over {
			if !c.gone && !yield(key, c.value) {
				return
			}
		}
		for key, v := range m.base {
			if _, changed := m.over[key]; !changed && !yield(key, v) {
				return
			}
		}
	}
}

// Edit begins a successor.
func (m Map[K, V]) Edit() *Edit[K, V] { return &Edit[K, V]{m: m} }

// Edit is a map that is being made of another, by one goroutine. Get sees what was set.
type Edit[K comparable, V any] struct {
	m   Map[K, V]
	own bool // m.over is this edit's
}

// Get returns the value of a key, and whether there is one.
func (e *Edit[K, V]) Get(key K) (V, bool) { return e.m.Get(key) }

// Set gives a key its value.
func (e *Edit[K, V]) Set(key K, value V) {
	if _, ok := e.m.Get(key); !ok {
		e.m.size++
	}
	e.put(key, change[V]{value: value})
}

// Delete takes a key out.
func (e *Edit[K, V]) Delete(key K) {
	if _, ok := e.m.Get(key); ok {
		e.m.size--
		e.put(key, change[V]{gone: true})
	}
}

func (e *Edit[K, V]) put(key K, c change[V]) {
	if !e.own {
		over := make(map[K]change[V], len(e.m.over)+1)
		maps.Copy(over, e.m.over)
		e.m.over, e.own = over, true
	}
	e.m.over[key] = c
}

// Map returns what has been made, and ends the edit.
func (e *Edit[K, V]) Map() Map[K, V] {
	// Each change copies the changes since the base was made, and one in many the base: both
	// cost the same when the changes are the root of twice the size.
	if n := len(e.m.over); e.own && n*n > 2*len(e.m.base)+least*least {
		base := make(map[K]V, e.m.size)
		for key, v := range e.m.All() {
			base[key] = v
		}
		e.m.base, e.m.over = base, nil
	}
	e.own = false
	return e.m
}

// least is for how many changes alone no base is made.
const least = 8
