package publish

import "time"

// pace says when something may be written. What is wanted anew is written at once; what was
// written and is not there, because the watch does not show it yet, somebody wrote something
// else, or it could not be written, is written again after ever longer. So two that disagree
// about an object, as two releases of control may, change it a few times in an hour and not
// every second.
type pace[T any] struct {
	same  func(a, b T) bool
	tried map[string]attempt[T]
}

// attempt is the last one for an object.
type attempt[T any] struct {
	want  T
	after time.Time // not again before, unless something else is wanted
	wait  time.Duration
}

// Bounds of what is written.
const (
	writesEach  = 20 // in each look, which is a second
	shownWithin = 10 * time.Second
	mostWait    = 5 * time.Minute
)

func newPace[T any](same func(a, b T) bool) pace[T] {
	return pace[T]{same, map[string]attempt[T]{}}
}

// may reports whether it may be written now.
func (p *pace[T]) may(key string, want T, now time.Time) bool {
	last, ok := p.tried[key]
	return !ok || !p.same(last.want, want) || !now.Before(last.after)
}

// wrote notes an attempt.
func (p *pace[T]) wrote(key string, want T, now time.Time) {
	wait := shownWithin
	if last, ok := p.tried[key]; ok && p.same(last.want, want) {
		wait = min(2*last.wait, mostWait)
	}
	p.tried[key] = attempt[T]{want, now.Add(wait), wait}
}

// stands notes that what is wanted is there. When it has been so for long, nobody disagrees.
func (p *pace[T]) stands(key string, now time.Time) {
	if last, ok := p.tried[key]; ok && now.After(last.after.Add(last.wait)) {
		delete(p.tried, key)
	}
}

// keep forgets what is not there any more.
func (p *pace[T]) keep(there map[string]bool) {
	for key := range p.tried {
		if !there[key] {
			delete(p.tried, key)
		}
	}
}
