package agent

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// redialEvery is how often `assay run` looks for an agent after its own has gone.
const redialEvery = 200 * time.Millisecond

// Locate asks the agent at path how to reach its namespaces.
func Locate(path string) (Where, error) {
	conn, err := dialAgent(path)
	if err != nil {
		return Where{}, err
	}
	defer conn.Close()
	if err := conn.Send(kindWhere, 1, nil); err != nil {
		return Where{}, noAgent(path, err)
	}
	conn.Socket().SetReadDeadline(time.Now().Add(firstWithin))
	m, err := conn.Receive()
	if err != nil {
		return Where{}, noAgent(path, err)
	}
	defer m.Discard()
	var w Where
	return w, m.Decode(&w)
}

func dialAgent(path string) (*link.Conn, error) {
	conn, err := link.Dial(path)
	if err != nil {
		return nil, noAgent(path, err)
	}
	return conn, nil
}

func noAgent(path string, err error) error {
	e := &assay.Error{Kind: assay.Unavailable, Op: "reach the agent at " + path, Err: err, Remedy: "start one: assay up, or assay agent --control ADDRESS"}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		e.Err = errors.New("no agent runs there")
	}
	return e
}

// Placement is a workload's place, held by the process whose command runs in it. It
// survives the agent: Run dials until there is one again.
type Placement struct {
	Placed
	Namespace *netns.Namespace
	path      string
	over      chan struct{} // the agent has removed the workload

	mu       sync.Mutex
	conn     *link.Conn
	command  *os.File // pidfd
	draining bool
	ended    bool
}

// Place asks the agent at path for a place. Run must be called next.
func Place(ctx context.Context, path string, req RunRequest) (*Placement, error) {
	conn, err := dialAgent(path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	m, err := question(conn, kindRun, req)
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	defer m.Discard()
	p := &Placement{path: path, conn: conn, over: make(chan struct{})}
	if err := m.Decode(&p.Placed); err != nil || len(m.Files) != 1 {
		conn.Close()
		return nil, errors.Join(errors.New("the agent's answer has no network namespace"), err)
	}
	p.Namespace, err = netns.FromFile(os.NewFile(uintptr(m.Take()[0]), "namespace"))
	if err != nil {
		conn.Close()
		return nil, err
	}
	return p, nil
}

// question sends one message and waits for the answer, which may be a failure.
func question(conn *link.Conn, kind link.Kind, body any, files ...int) (link.Message, error) {
	if err := conn.Send(kind, 1, body, files...); err != nil {
		return link.Message{}, err
	}
	m, err := conn.Receive()
	if err != nil {
		return m, &assay.Error{Kind: assay.Unavailable, Op: "run", Err: errors.New("the agent ended before it answered"), Remedy: "try again"}
	}
	if m.Kind == kindFailed {
		defer m.Discard()
		var f failure
		if err := m.Decode(&f); err != nil {
			return link.Message{}, err
		}
		return link.Message{}, f.error()
	}
	return m, nil
}

// Run keeps the connection to the agent until the workload is over or ctx ends. It
// returns an error when an agent no longer knows the workload: the command is cut off
// then.
func (p *Placement) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, p.hangUp)
	defer stop()
	defer p.hangUp()
	for {
		p.mu.Lock()
		conn := p.conn
		p.mu.Unlock()
		for {
			m, err := conn.Receive()
			if err != nil {
				break
			}
			m.Discard()
			if m.Kind == kindOver {
				close(p.over)
				return nil
			}
		}
		conn.Close()
		err := error(&assay.Error{Kind: assay.Unavailable, Op: "run " + p.Workload, Err: errors.New("its agent has ended, and the network with it")})
		if !p.Last {
			err = p.resume(ctx)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			close(p.over)
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.ended {
				return nil // the agent saw it first
			}
			return err
		}
	}
}

func (p *Placement) hangUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn.Close()
}

// resume finds the next agent and tells it everything that the last one knew.
func (p *Placement) resume(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(redialEvery):
		}
		conn, err := link.Dial(p.path)
		if err != nil {
			continue
		}
		p.mu.Lock()
		var files []int
		if p.command != nil {
			files = append(files, int(p.command.Fd()))
		}
		p.mu.Unlock()
		m, err := question(conn, kindResume, resume{Workload: p.Workload}, files...)
		if err != nil {
			conn.Close()
			if assay.KindOf(err) == assay.NotFound || assay.KindOf(err) == assay.Denied {
				return err
			}
			continue
		}
		m.Discard()
		p.mu.Lock()
		p.conn = conn
		if p.command != nil && len(files) == 0 { // it was started meanwhile
			conn.Send(kindStarted, 0, nil, int(p.command.Fd()))
		}
		if p.draining {
			conn.Send(kindDraining, 0, nil)
		}
		if p.ended {
			conn.Send(kindEnded, 0, nil)
		}
		if ctx.Err() != nil {
			conn.Close()
		}
		p.mu.Unlock()
		return nil
	}
}

// Started tells the agent which process the command is, and takes over its pidfd.
func (p *Placement) Started(pidfd *os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.command = pidfd
	err := p.conn.Send(kindStarted, 0, nil, int(pidfd.Fd()))
	if errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil // resume tells the next agent
	}
	return err
}

// Draining tells that the command was asked to stop: it gets nothing new.
func (p *Placement) Draining() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.draining = true
	p.conn.Send(kindDraining, 0, nil)
}

// Ended tells that the command has ended, and waits until everything is removed or ctx
// ends. Without an agent the next one removes it.
func (p *Placement) Ended(ctx context.Context) {
	p.mu.Lock()
	p.ended = true
	p.conn.Send(kindEnded, 0, nil)
	p.mu.Unlock()
	p.Namespace.Close()
	select {
	case <-p.over:
	case <-ctx.Done():
	}
}
