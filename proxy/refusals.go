package proxy

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"assay.dev"
)

// refusalLog writes refusals. The first of a kind about a subject is written at once; those
// that follow within a minute are one line at its end, which says how many they were and
// what the last one's error was. To be refused costs a client next to nothing, and many try
// again at once: what counts them all are metrics.
type refusalLog struct {
	log *slog.Logger

	mu    sync.Mutex
	lines map[refused]*refusedLine
	timer *time.Timer // runs while there are lines
}

// refused is a kind of refusal and its subject. Fields that say nothing are zero.
type refused struct {
	message     string // of the line; "": refused
	direction   assay.Direction
	source      netip.Addr
	peer        string
	destination netip.AddrPort
	service     string
	reason      string
	rule        string // of a route, as the error says it: written there alone
}

type refusedLine struct {
	written time.Time
	more    int // since
	err     error
}

const (
	refusedEvery = time.Minute
	// maxRefused bounds the subjects of a minute; others of a kind share a line without one.
	maxRefused = 1024
)

// add writes or counts a refusal.
func (l *refusalLog) add(r refused, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	line := l.lines[r]
	if line == nil && len(l.lines) >= maxRefused {
		r = refused{message: r.message, direction: r.direction, reason: r.reason}
		line = l.lines[r]
	}
	if line != nil {
		line.more++
		line.err = err
		return
	}
	if l.lines == nil {
		l.lines = map[refused]*refusedLine{}
	}
	l.lines[r] = &refusedLine{written: time.Now()}
	l.write(&r, 1, err)
	if len(l.lines) == 1 {
		l.timer = time.AfterFunc(refusedEvery, l.due)
	}
}

// due writes what was counted for a minute, and forgets what did not come again.
func (l *refusalLog) due() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, next := time.Now(), time.Duration(-1)
	for r, line := range l.lines {
		left := refusedEvery - now.Sub(line.written)
		switch {
		case left > 0:
		case line.more == 0:
			delete(l.lines, r)
			continue
		default:
			l.write(&r, line.more, line.err)
			*line, left = refusedLine{written: now}, refusedEvery
		}
		if next < 0 || left < next {
			next = left
		}
	}
	if next >= 0 {
		l.timer.Reset(next)
	}
}

// close writes what was counted.
func (l *refusalLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
	}
	for r, line := range l.lines {
		if line.more > 0 {
			l.write(&r, line.more, line.err)
		}
	}
	clear(l.lines)
}

func (l *refusalLog) write(r *refused, times int, err error) {
	var list []any
	say := func(key, value string) {
		if value != "" {
			list = append(list, key, value)
		}
	}
	say("direction", string(r.direction))
	if r.source.IsValid() {
		say("source", r.source.String())
	}
	say("peer", r.peer)
	if r.destination.IsValid() {
		say("destination", r.destination.String())
	}
	say("service", r.service)
	say("reason", r.reason)
	if err != nil {
		list = append(list, "error", err)
	}
	if times > 1 {
		list = append(list, "times", times)
	}
	message := r.message
	if message == "" {
		message = "refused"
	}
	l.log.Info(message, list...)
}
