package mux

// Batch gathers what one goroutine queues on many streams, of one session or several,
// so that it is written in one go when the batch is flushed. It is for whoever reads a
// connection of his own and finds frames of many streams in one read; the zero value is
// ready to use. Between the first Hold and Flush the goroutine must not wait for
// anything: others' frames wait with its own.
type Batch struct{ held []*Session }

// Hold has s write nothing before Flush, unless much is queued.
func (b *Batch) Hold(s *Session) {
	for _, h := range b.held {
		if h == s {
			return
		}
	}
	b.held = append(b.held, s)
	s.mu.Lock()
	s.holds++
	s.mu.Unlock()
}

// Flush writes what was queued, and forgets the sessions.
func (b *Batch) Flush() {
	for i, s := range b.held {
		s.mu.Lock()
		if s.holds--; s.holds == 0 {
			s.kick()
		}
		s.mu.Unlock()
		b.held[i] = nil
	}
	b.held = b.held[:0]
}

// Flusher has something to write once the reader has called its handlers.
type Flusher interface{ Flush() }

// Later has the session's reader call f when it has handled what it read, and reports
// whether it will: only a handler that the reader calls can be sure of that. What is
// received for many streams can so be written to one socket in one go. f must not block.
func (st Stream) Later(f Flusher) bool {
	if st.c == nil {
		return false
	}
	s := st.c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dispatching {
		s.after = append(s.after, f)
	}
	return s.dispatching
}

// runAfter calls what asked for it, and keeps the list's memory.
func (s *Session) runAfter(list []Flusher) {
	for i, f := range list {
		f.Flush()
		list[i] = nil
	}
	s.mu.Lock()
	if s.after == nil {
		s.after = list[:0]
	}
	s.mu.Unlock()
}
