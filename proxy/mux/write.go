package mux

import "runtime"

// The way out:
//
//	Open, Write, TryWrite, Consumed, Reset      the reader's own answers
//	          \          |                        /
//	           append frames to Session.out (mu)
//	                         |
//	       the first to find the writer idle: flush itself,
//	       or with many streams open, wake the flusher
//	                         |
//	   conn.Write: one TLS record and system call for all of them
//	                         |            \
//	                  kernel takes it      kernel is full, or conn may block:
//	                                       the flusher waits and goes on
//
// While the reader calls handlers it writes what they queue in one go at the end.

const (
	// bulkQueued is how many queued bytes stop a slice of bulk data from being
	// queued. So a small frame waits for at most this, one slice more, and as much
	// again that is being written.
	bulkQueued = 64 << 10
	// smallData is what is not bulk: it may queue up to Config.MaxQueued.
	smallData = 2 << 10
	// flushEarly is how much the reader's handlers may queue before it is written.
	flushEarly = 16 << 10
	// gather is how many streams must be open for the flusher to write, when other
	// goroutines have run: they are likely to queue frames too, and one record for all of
	// them costs a fifth of one for each. Cryptography needs more stack than all else, so
	// the goroutines of many streams also stay small. A lone request does not wait for nobody.
	gather = 4
	// keepBuffer is the largest buffer that is used again.
	keepBuffer = 128 << 10
	// record is what TLS puts into one record, and writes by itself.
	record = 16 << 10
	// slack is how far frames that no stream waits for may exceed MaxQueued.
	slack = 1 << 20
)

func (s *Session) hasRoom(n int) bool {
	if n <= smallData {
		return len(s.out) < s.cfg.MaxQueued
	}
	return len(s.out) < bulkQueued
}

// queue appends as much of p as credit and room allow, in slices, and fin if all of
// it was taken. It returns how much was.
func (s *Session) queue(c *stream, p []byte, fin bool) (n int) {
	if len(p) == 0 {
		if fin {
			s.out = appendHeader(s.out, frameData, flagFin, 0, c.id)
			s.sentFin(c)
		}
		return 0
	}
	for n < len(p) {
		k := min(len(p)-n, maxPayload, c.credit)
		if k == 0 || !s.hasRoom(k) {
			return n
		}
		last := fin && n+k == len(p)
		var f byte
		if last {
			f = flagFin
		}
		s.out = appendHeader(s.out, frameData, f, k, c.id)
		s.out = append(s.out, p[n:n+k]...)
		c.credit -= k
		n += k
		if last {
			s.sentFin(c)
		}
	}
	return n
}

// kick sees to it that what is queued is written, without blocking.
func (s *Session) kick() {
	switch {
	case s.writing || s.end != nil || len(s.out) == 0:
		if len(s.out) > s.cfg.MaxQueued+slack {
			s.failLocked(&Error{Reason: ReasonFlood, Detail: "queue-overflow"})
		}
	case (s.dispatching || s.holds > 0) && len(s.out) < flushEarly:
	case s.sock == nil, !s.dispatching && s.mine+s.theirs >= gather:
		s.writing = true
		s.wakeFlusher()
	default:
		s.flush()
	}
}

// flushOwn is kick for a goroutine that may block.
func (s *Session) flushOwn() {
	if s.sock == nil && !s.writing && s.end == nil && len(s.out) > 0 {
		s.flush()
		return
	}
	s.kick()
}

// flush writes what is queued. A writer does so twice at most: what others queue
// meanwhile is then the flusher's, so that nobody writes for others without end.
func (s *Session) flush() {
	s.writing = true
	for turn := 0; turn < 2 && s.end == nil && len(s.out) > 0 && !s.full(); turn++ {
		s.writeOut()
	}
	if s.end == nil && (len(s.out) > 0 || s.full()) {
		s.wakeFlusher()
		return
	}
	s.stopWriting()
}

func (s *Session) full() bool { return s.sock != nil && s.sock.full.Load() }

func (s *Session) stopWriting() {
	s.writing = false
	if s.end != nil {
		s.written.Broadcast()
	}
}

// writeOut swaps the two buffers and writes the full one with mu released.
func (s *Session) writeOut() {
	buf := s.out
	s.out, s.spare = s.spare[:0], nil
	s.wakeRoom()
	s.mu.Unlock()
	cork := s.sock != nil && len(buf) > record // one system call for all records
	if cork {
		s.sock.cork()
	}
	_, err := s.conn.Write(buf)
	if cork {
		if e := s.sock.uncork(); err == nil {
			err = e
		}
	}
	s.mu.Lock()
	s.writes++
	if cap(buf) <= keepBuffer {
		s.spare = buf[:0]
	}
	if err != nil {
		s.failLocked(&Error{Reason: ReasonIO, Err: err})
	}
}

// wakeFlusher leaves the writer, which s.writing has taken, to the flusher.
func (s *Session) wakeFlusher() {
	if s.parked {
		s.given = true
		s.unpark()
		return
	}
	s.tasks.Add(1)
	go s.flusherFn()
}

// flusher owns the writer (s.writing is set) until everything is written, and waits to own
// it again while many streams are open.
func (s *Session) flusher() {
	defer s.tasks.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.mine+s.theirs >= gather {
			s.mu.Unlock()
			runtime.Gosched()
			s.mu.Lock()
		}
		s.writeAway()
		s.stopWriting()
		if s.end != nil || s.parked || s.mine+s.theirs < gather {
			return
		}
		s.parked = true
		for s.parked {
			s.work.Wait()
		}
		if !s.given {
			return
		}
		s.given = false
	}
}

// unpark ends the wait of a flusher, and the flusher if it was not given the writer.
func (s *Session) unpark() {
	if s.parked {
		s.parked = false
		s.work.Signal()
	}
}

// writeAway writes until nothing is left.
func (s *Session) writeAway() {
	for s.end == nil {
		if s.full() {
			s.mu.Unlock()
			err := s.sock.drain()
			s.mu.Lock()
			if err != nil {
				s.failLocked(&Error{Reason: ReasonIO, Err: err})
			}
			continue
		}
		if len(s.out) == 0 {
			return
		}
		s.writeOut()
	}
}

// wakeRoom tells as many waiting streams as may find room, first come first served.
// Whoever then does not use it calls wakeRoom for the next.
func (s *Session) wakeRoom() {
	for room := bulkQueued - len(s.out); room > 0 && s.room.head != nil && s.end == nil; {
		c := s.room.pop()
		switch {
		case c.flags&flagBlocked != 0:
			c.wakeWriter()
			room -= maxPayload
		case c.flags&(flagDead|flagGone) == 0:
			s.tellWritable(c)
			room -= maxPayload
		}
		s.unpin(c)
	}
}

// tellWritable has the notifier call c's Writable.
func (s *Session) tellWritable(c *stream) {
	s.notify.push(c)
	if !s.notifying && s.end == nil {
		s.notifying = true
		s.tasks.Add(1)
		go s.notifierFn()
	}
}

// notifier calls Writable for streams that the reader has no reason to call.
func (s *Session) notifier() {
	defer s.tasks.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.notify.head != nil {
		c := s.notify.pop()
		id := c.id
		s.mu.Unlock()
		c.call.Lock()
		if c.live.Load() == id {
			c.h.Writable(Stream{c, id})
		}
		c.call.Unlock()
		s.mu.Lock()
		c.wakeWriter() // one that wanted to wait for room meanwhile was in this list, not in that
		s.unpin(c)
		s.wakeRoom()
	}
	s.notifying = false
}
