package http2

import (
	"context"
	"sync"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
)

// Outbound serves an application's own HTTP/2 connections: each request becomes a stream
// to an upstream that a Dispatcher chooses.
type Outbound struct {
	Config Config

	mu       sync.Mutex
	conns    map[*conn]struct{}
	draining bool
}

// Serve carries tcp's requests until it ends, and closes it. The connection begins with
// the client's preface. It returns nil when the connection ended as HTTP/2 lets it end,
// and otherwise why it did not: a *Refusal among others. The end of ctx resets it.
func (o *Outbound) Serve(ctx context.Context, tcp nowait.Conn, d Dispatcher) error {
	c := newConn(ctx, true, o.Config)
	c.d, c.faults = d, d
	if err := c.open(tcp); err != nil {
		c.mu.Lock()
		c.leave()
		c.mu.Unlock()
		c.cancel()
		tcp.Close()
		return err
	}
	o.add(c)
	unwatch := context.AfterFunc(ctx, c.stop)
	err := c.serve()
	unwatch()
	o.mu.Lock()
	delete(o.conns, c)
	o.mu.Unlock()
	return err
}

func (o *Outbound) add(c *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conns == nil {
		o.conns = map[*conn]struct{}{}
	}
	o.conns[c] = struct{}{}
	if o.draining {
		c.mu.Lock()
		c.drain()
		c.mu.Unlock()
	}
}

// Drain lets every connection finish the streams that it carries and accept no other, and
// ends it then. It returns at once.
func (o *Outbound) Drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.draining = true
	for c := range o.conns {
		c.mu.Lock()
		c.drain()
		c.mu.Unlock()
	}
}

// hold has what is pushed for x written at the end of the batch, when the reader is
// pushing.
func (c *conn) hold(x *stream) {
	if c.batching {
		c.batch.Hold(x.st.Session())
	}
}

var _ mux.Handler = (*stream)(nil)
