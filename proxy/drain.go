package proxy

import (
	"context"
	"os"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/nowait"
	"golang.org/x/sys/unix"
)

// A proxy is replaced by another one of the same workload without a connection being
// lost: both accept on the same listeners for a moment, then the old one drains. Its
// HTTP/1 connections move between two requests, as descriptors; sessions of its peers
// are told to take nothing new, so the peers dial, and meet the new one. What is bound
// to this process (an opaque connection, a tunnel, a request that runs) ends here, or
// at the deadline.

// giveWithin bounds one handover: a successor that does not take it is dead.
const giveWithin = 5 * time.Second

var longAgo = time.Unix(1, 0)

// Drain accepts nothing more, lets what runs end until the deadline, then ends Run.
// With an heir, which it closes, what can move goes there. Called again, it can bring
// the deadline forward and change the heir.
func (p *Proxy) Drain(deadline time.Time, heir *link.Conn) {
	if heir != nil {
		if old := p.heir.Swap(heir); old != nil {
			old.Close()
		}
	}
	p.mu.Lock()
	if p.deadline.IsZero() || deadline.Before(p.deadline) {
		p.deadline = deadline
	}
	p.mu.Unlock()
	p.closeListeners()
	select {
	case p.sooner <- struct{}{}:
	default:
	}
}

// isDraining reports whether Drain was called.
func (p *Proxy) isDraining() bool {
	select {
	case <-p.draining:
		return true
	default:
		return false
	}
}

func (p *Proxy) awaitDrain(ctx context.Context, cancel context.CancelCauseFunc) {
	select {
	case <-ctx.Done():
		return
	case <-p.draining:
	}
	var out, in http1.Give
	if p.heir.Load() != nil {
		out, in = p.give(link.ListenOutbound), p.give(link.ListenInbound)
	}
	p.http.out.Drain(out)
	p.http.in.Drain(in)
	p.http2.out.Drain()
	p.mu.Lock()
	for s := range p.sessions {
		s.drain()
	}
	p.checkIdle()
	p.mu.Unlock()
	for {
		p.mu.Lock()
		t := time.NewTimer(time.Until(p.deadline))
		p.mu.Unlock()
		select {
		case <-p.sooner:
			t.Stop()
			continue
		case <-ctx.Done():
		case <-p.idle:
		case <-t.C:
			p.mu.Lock()
			p.log.Warn("the drain's deadline has come", "connections", p.work)
			p.mu.Unlock()
		}
		t.Stop()
		break
	}
	if heir := p.heir.Load(); heir != nil {
		heir.Close()
	}
	cancel(errDrained)
}

// drain has the peer open new streams elsewhere. Sessions that this proxy dialled go
// on: requests that are being read need them.
func (s *session) drain() {
	if s.remote.IsValid() && s.reason != reasonHairpin {
		s.mux.Drain()
	}
}

// give sends connections of one listener to the heir.
func (p *Proxy) give(role string) http1.Give {
	return func(tcp nowait.Conn, first []byte) bool {
		raw, err := tcp.SyscallConn()
		if err != nil {
			return false
		}
		for heir := p.heir.Load(); ; {
			raw.Control(func(fd uintptr) {
				heir.Socket().SetWriteDeadline(time.Now().Add(giveWithin))
				err = heir.Send(link.KindConnection, 0, link.Connection{Role: role, First: first}, int(fd))
			})
			next := p.heir.Load()
			if err == nil || next == heir {
				break
			}
			heir = next // another one was named meanwhile
		}
		if err != nil {
			p.log.Warn("a connection stays: the successor does not take it", "error", err)
		}
		return err == nil
	}
}

// inherit serves what a predecessor sends until that has ended.
func (p *Proxy) inherit(ctx context.Context, from *link.Conn) {
	defer p.end() // of the begin when it was given
	stop := context.AfterFunc(ctx, func() { from.Close() })
	defer stop()
	defer from.Close()
	for {
		m, err := from.Receive()
		if err != nil {
			return
		}
		if err := p.take(ctx, &m); err != nil {
			p.log.Error("a predecessor's connection cannot be served", "error", err)
		}
		m.Discard()
	}
}

// take serves one connection from where the predecessor stopped.
func (p *Proxy) take(ctx context.Context, m *link.Message) error {
	var c link.Connection
	if err := m.Decode(&c); err != nil {
		return err
	}
	if m.Kind != link.KindConnection || len(m.Files) != 1 {
		return os.ErrInvalid
	}
	tcp, err := nowait.NewTCP(m.Take()[0])
	if err != nil {
		return err
	}
	p.serveConn(func() {
		defer tcp.Close()
		stop := context.AfterFunc(ctx, func() { abort(tcp) })
		defer stop()
		if c.Role == link.ListenInbound {
			i := p.newInbound(ctx, tcp)
			defer i.leave()
			if err := i.resume(c.First); err != nil {
				i.refuse(err)
			}
			return
		}
		o := p.newOutbound(ctx, tcp)
		if err := o.resume(c.First); err != nil {
			o.refuse(err)
		}
	})
	return nil
}

// resume serves an application's connection whose protocol is known.
func (o *outbound) resume(first []byte) (err error) {
	if o.raw, err = o.conn.SyscallConn(); err != nil {
		return err
	}
	if err := o.original(); err != nil {
		return err
	}
	if err := o.route(); err != nil {
		return err
	}
	if o.outside {
		return &refusal{refusedUnknown, nil}
	}
	o.protocol = assay.HTTP1
	return o.serveHTTP(first)
}

// resume serves a plaintext client's connection whose protocol is known.
func (i *inbound) resume(first []byte) error {
	if err := i.identify(); err != nil {
		return err
	}
	i.protocol = assay.HTTP1
	return i.plaintext(first)
}

// fileConn turns the one descriptor of a message into a link.
func fileConn(m *link.Message) (*link.Conn, error) {
	if len(m.Files) != 1 {
		return nil, unix.EBADMSG
	}
	return link.FileConn(os.NewFile(uintptr(m.Take()[0]), string(m.Kind)))
}
