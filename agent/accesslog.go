package agent

import (
	"context"
	"encoding/json"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
)

// accessLog is the access log on its way to where it is written. Whoever adds a line
// waits for nobody: a disk that hangs, or a pipe that nobody reads, costs lines, which are
// counted, and neither requests nor the renewals of the proxy that told of them.
type accessLog struct {
	to      io.Writer // takes one line with each Write
	dropped *atomic.Uint64
	more    chan struct{}

	mu   sync.Mutex
	list [][]byte
	size int // of the lines in list
}

const (
	maxLogWaiting = 4 << 20     // bytes of lines that wait to be written
	logLast       = time.Second // for what is left at the agent's end
)

func newAccessLog(to io.Writer, dropped *atomic.Uint64) *accessLog {
	return &accessLog{to: to, dropped: dropped, more: make(chan struct{}, 1)}
}

// add makes a line of JSON of a request.
func (l *accessLog) add(r *assay.Record) {
	one := *r
	one.Watches = nil
	line, err := json.Marshal(&one)
	if err != nil {
		l.dropped.Add(1)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+len(line) > maxLogWaiting {
		l.dropped.Add(1)
		return
	}
	l.list, l.size = append(l.list, append(line, '\n')), l.size+len(line)+1
	select {
	case l.more <- struct{}{}:
	default:
	}
}

// run writes lines until ctx ends, and then what is left, as far as that does not hang.
func (l *accessLog) run(ctx context.Context) {
	written := make(chan struct{})
	go l.write(ctx, written)
	<-ctx.Done()
	select {
	case <-written:
	case <-time.After(logLast):
		// Nothing ends a write to a disk that hangs, but its end.
		l.dropped.Add(uint64(len(l.take())))
	}
}

func (l *accessLog) write(ctx context.Context, written chan<- struct{}) {
	defer close(written)
	for over := false; !over; {
		select {
		case <-l.more:
		case <-ctx.Done():
			over = true
		}
		for list := l.take(); len(list) > 0; list = l.take() {
			for _, line := range list {
				if _, err := l.to.Write(line); err != nil {
					l.dropped.Add(1)
				}
			}
		}
	}
}

// take returns what waits, at most so much that little is lost when its writer hangs.
func (l *accessLog) take() [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.list), 256)
	list := l.list[:n:n]
	if l.list = l.list[n:]; len(l.list) == 0 {
		l.list = nil
	}
	for _, line := range list {
		l.size -= len(line)
	}
	return list
}
