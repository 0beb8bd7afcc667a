package agent

import (
	"context"
	"sync"
	"time"
)

// latch is a fact that becomes true once.
type latch struct {
	once sync.Once
	ch   chan struct{}
}

func newLatch() *latch { return &latch{ch: make(chan struct{})} }

func (l *latch) set() { l.once.Do(func() { close(l.ch) }) }

func (l *latch) is() bool {
	select {
	case <-l.ch:
		return true
	default:
		return false
	}
}

// within waits until the latch is set, at most d.
func (l *latch) within(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-l.ch:
	case <-t.C:
	case <-ctx.Done():
	}
	return l.is()
}
