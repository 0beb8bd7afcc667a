package detect

import (
	"sync/atomic"
	"time"
)

const (
	// evidence is how many connections in a row a server must have begun before the
	// next client is not waited for.
	evidence = 2
	// lifetime is how long that is believed without being seen again.
	lifetime = 10 * time.Minute
)

// Memory is what was learned about one port of one service. It only ever removes
// the wait. The zero value knows nothing. It takes no lock.
type Memory struct {
	count atomic.Uint32
	seen  atomic.Int64 // Unix nanoseconds of the last evidence
}

// ServerFirst reports whether the server of this port is known to speak first.
func (m *Memory) ServerFirst(now time.Time) bool {
	return m.count.Load() >= evidence && now.UnixNano()-m.seen.Load() < int64(lifetime)
}

// Observe takes the outcome of a connection.
func (m *Memory) Observe(o Outcome, now time.Time) {
	switch o {
	case ServerFirst:
		if now.UnixNano()-m.seen.Load() >= int64(lifetime) {
			m.count.Store(0)
		}
		m.seen.Store(now.UnixNano())
		if m.count.Load() < evidence {
			m.count.Add(1)
		}
	case ClientHTTP1, ClientHTTP2, ClientTLS, ClientOpaque:
		m.count.Store(0)
	}
}
