package kubernetes

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
)

// relay is the door to the API server for programs outside the cluster: a free port
// of the loopback interface.
type relay struct {
	listener net.Listener
	target   netip.AddrPort
	machine  *Machine

	mu    sync.Mutex
	open  map[net.Conn]bool
	ended bool
	all   sync.WaitGroup
}

func newRelay(m *Machine, target netip.AddrPort) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("relay to the API server: %w", err)
	}
	r := &relay{listener: l, target: target, machine: m, open: map[net.Conn]bool{}}
	r.all.Go(r.accept)
	return r, nil
}

func (r *relay) accept() {
	for {
		conn, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.all.Go(func() { r.carry(conn) })
	}
}

// carry relays one connection until both sides have ended.
func (r *relay) carry(client net.Conn) {
	defer client.Close()
	var server net.Conn
	err := r.machine.In(func() (err error) {
		server, err = net.Dial("tcp", r.target.String())
		return err
	})
	if err != nil {
		return
	}
	defer server.Close()
	if !r.remember(client, server) {
		return
	}
	defer r.forget(client, server)
	var both sync.WaitGroup
	both.Go(func() { copyHalf(server, client) })
	copyHalf(client, server)
	both.Wait()
}

func copyHalf(to, from net.Conn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	to.(*net.TCPConn).CloseWrite()
}

func (r *relay) remember(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		r.open[c] = true
	}
	return !r.ended
}

func (r *relay) forget(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		delete(r.open, c)
	}
}

// Close ends the relay and everything that goes through it.
func (r *relay) Close() {
	r.listener.Close()
	r.mu.Lock()
	r.ended = true
	for c := range r.open {
		c.Close()
	}
	r.mu.Unlock()
	r.all.Wait()
}
