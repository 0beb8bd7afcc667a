package mux

import "time"

// keepalive asks a silent peer whether it is there, notices a connection that takes
// no more bytes, and gives back memory that a burst left behind. Session.mu guards it.
type keepalive struct {
	timer    *time.Timer
	asked    bool // a PING is unanswered
	askedAt  time.Duration
	question uint64
	writes   uint64 // at the last tick
	moved    uint64
	stuck    bool // the same write was under way at the last tick
}

func (s *Session) startKeepalive() {
	s.lastRead.Store(int64(time.Since(s.born)))
	s.alive.timer = time.AfterFunc(s.cfg.PingEvery, s.tick)
}

func (s *Session) stopKeepalive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alive.timer != nil {
		s.alive.timer.Stop()
	}
}

// tick runs in the timer's goroutine.
func (s *Session) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil {
		return
	}
	s.shrink()
	k := &s.alive
	now := time.Since(s.born)
	quiet := now - time.Duration(s.lastRead.Load())

	moved := uint64(0)
	if s.sock != nil {
		moved = s.sock.moved.Load()
	}
	stuck := s.writing && k.writes == s.writes && k.moved == moved
	k.writes, k.moved = s.writes, moved

	next := s.cfg.PingTimeout
	switch {
	case stuck && k.stuck:
		s.failLocked(&Error{Reason: ReasonTimeout, Detail: "the peer does not read"})
		return
	case k.asked && now-k.askedAt >= s.cfg.PingTimeout && quiet >= s.cfg.PingTimeout,
		k.asked && now-k.askedAt >= 4*(s.cfg.PingEvery+s.cfg.PingTimeout):
		s.failLocked(&Error{Reason: ReasonTimeout, Detail: "no answer to a ping"})
		return
	case !k.asked && quiet >= s.cfg.PingEvery:
		k.asked, k.askedAt = true, now
		k.question++
		s.out = appendPing(s.out, framePing, k.question)
		s.kick()
	case !k.asked:
		next = s.cfg.PingEvery - quiet
	}
	k.stuck = stuck
	k.timer.Reset(next)
}

func (s *Session) onPing(kind byte, payload uint64) *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.alive
	if kind == framePong {
		if !k.asked || payload != k.question {
			return broken("pong-unasked")
		}
		k.asked = false
		return nil
	}
	if end := s.flood.ping(s); end != nil {
		return end
	}
	s.out = appendPing(s.out, framePong, payload)
	return nil
}

// shrink gives back what an idle session does not need.
func (s *Session) shrink() {
	if cap(s.spare) > 1<<10 {
		s.spare = nil
	}
	if len(s.out) == 0 && cap(s.out) > 1<<10 {
		s.out = nil
	}
	if s.mine+s.theirs < gather {
		s.unpark()
	}
	s.streams.shrink()
	for keep := 16 + 2*s.streams.n; s.nfree > keep; s.nfree-- {
		s.free = s.free.next
	}
}

// flood counts, for each second, frames that cost us work and the peer next to
// nothing: resets (each may have caused a dial), pings, and frames about streams
// that are gone.
type flood struct {
	second               time.Duration
	resets, pings, stray int
}

const maxPings = 64

// maxZombies bounds the streams that we reset and that the peer does not let go.
func (s *Session) maxZombies() int { return 1000 + s.cfg.MaxStreams }

func (f *flood) roll(s *Session) {
	if now := time.Since(s.born) / time.Second; now != f.second {
		*f = flood{second: now}
	}
}

func (f *flood) ping(s *Session) *Error {
	f.roll(s)
	if f.pings++; f.pings > maxPings {
		return &Error{Reason: ReasonFlood, Detail: "pings"}
	}
	return nil
}

func (f *flood) reset(s *Session) *Error {
	f.roll(s)
	if f.resets++; f.resets > max(1000, s.cfg.MaxStreams) {
		return &Error{Reason: ReasonFlood, Detail: "resets"}
	}
	return nil
}

func (f *flood) stale(s *Session) *Error {
	f.roll(s)
	if f.stray++; f.stray > max(1000, s.cfg.MaxStreams) {
		return &Error{Reason: ReasonFlood, Detail: "stale-credit"}
	}
	return nil
}
