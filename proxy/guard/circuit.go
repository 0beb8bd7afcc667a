package guard

import (
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
)

// Circuit stops the requests of one client to one port of a service when that, whole,
// answers badly: whoever asks is told so at once, and a service that is down is not held
// there by those who try. It is off until a policy says when that is. The zero value is.
//
// What an endpoint's Breaker is for the others to step in, Circuit is for when nobody
// can.
type Circuit struct {
	Counts *Counts      // may be nil
	state  atomic.Int32 // what is asked without the lock

	mu    sync.Mutex
	rules assay.BreakerPolicy
	b     Breaker
}

// States of a circuit.
const (
	circuitOff    = iota
	circuitQuiet  // closed, and a good answer tells it nothing
	circuitClosed // closed
	circuitOpen
)

// Set changes the rules, which must have their defaults.
func (c *Circuit) Set(rules assay.BreakerPolicy) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rules = rules; rules.Off() {
		c.b = Breaker{}
	}
	c.settle()
}

func (c *Circuit) settle() {
	switch {
	case c.rules.Off():
		c.state.Store(circuitOff)
	case !c.b.Fit():
		c.state.Store(circuitOpen)
	case c.b.Quiet(&c.rules):
		c.state.Store(circuitQuiet)
	default:
		c.state.Store(circuitClosed)
	}
}

// Allow reports whether a request may be sent.
func (c *Circuit) Allow(now time.Duration) bool {
	if c.state.Load() != circuitOpen {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.b.Fit() {
		return true
	}
	if c.b.Probe(&c.rules, now) {
		c.Counts.Count(CircuitProbe)
		return true
	}
	c.Counts.Count(CircuitRefused)
	return false
}

// Failed takes a request that came to nothing or was answered as a server's fault,
// after it was sent again as often as it may be.
func (c *Circuit) Failed(now time.Duration) {
	if c.state.Load() == circuitOff {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed(c.b.Failed(&c.rules, now))
}

// Answered takes a good answer and how long it took.
func (c *Circuit) Answered(took, now time.Duration) {
	if s := c.state.Load(); s == circuitOff || s == circuitQuiet {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed(c.b.Answered(&c.rules, took, now))
}

func (c *Circuit) changed(ch Change) {
	switch ch {
	case Opened:
		c.Counts.Count(CircuitOpen)
	case Closed:
		c.Counts.Count(CircuitClosed)
	}
	c.settle()
}

// Open says why the circuit is open and when a request probes; "" when it is not.
func (c *Circuit) Open() (why string, until time.Duration) {
	if c.state.Load() != circuitOpen {
		return "", 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Why(), c.b.Until()
}
