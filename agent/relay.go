package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev/agent/netns"
	"assay.dev/link"
)

// A resolver that listens on the host's loopback (dnsmasq, unbound, a container's
// stub) is reached by no workload: loopback is another one there. For such a host the
// agent relays questions that are about no service from the bridge's address to it,
// unread. Where the host's resolver can be reached directly there is no relay, and
// names do not depend on the agent.
const (
	relaySlots  = 256 // questions and connections at once; more are dropped
	relayWithin = 5 * time.Second
	maxQuestion = 4096
)

// dns is what proxies are told about names.
func (a *Agent) dns() link.DNS {
	a.mu.Lock()
	relay := a.relay
	a.mu.Unlock()
	d := link.DNS{Upstreams: a.cfg.Upstreams, Domain: a.cfg.Domain}
	if len(d.Upstreams) == 0 && relay.IsValid() {
		d.Upstreams = []netip.AddrPort{relay}
	}
	return d
}

// loopbackResolver is the host's resolver when it is on loopback.
func loopbackResolver() netip.AddrPort {
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return netip.AddrPort{}
	}
	for line := range strings.Lines(string(b)) {
		field := strings.Fields(line)
		if len(field) > 1 && field[0] == "nameserver" {
			if a, err := netip.ParseAddr(field[1]); err == nil && a.IsLoopback() {
				return netip.AddrPortFrom(a, 53)
			}
		}
	}
	return netip.AddrPort{}
}

// relayNames relays until ctx ends, if the host needs it.
func (a *Agent) relayNames(ctx context.Context, to netip.AddrPort) {
	if len(a.cfg.Upstreams) > 0 || !to.IsValid() || inUserNamespace() {
		return // the last: loopback is not the host's here either
	}
	select {
	case <-a.hostReady.ch:
	case <-ctx.Done():
		return
	}
	host := a.hostNetwork()
	if host == nil || len(host.Prefixes) == 0 {
		return
	}
	gateway := (&netns.Allocator{Prefix: host.Prefixes[0]}).Gateway()
	udp, tcp, err := listenBoth(gateway)
	if err != nil {
		a.log.Error("names outside of the mesh do not resolve in workloads", "err", err)
		return
	}
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	a.mu.Lock()
	a.relay = at
	a.mu.Unlock()
	a.changed()
	a.log.Info("questions for the host's resolver are relayed", "from", at, "to", to)
	r := relay{to: to.String(), slots: make(chan struct{}, relaySlots)}
	stop := context.AfterFunc(ctx, func() { udp.Close(); tcp.Close() })
	defer stop()
	var g sync.WaitGroup
	g.Go(func() { r.serveTCP(ctx, tcp) })
	r.serveUDP(ctx, udp)
	g.Wait()
}

// listenBoth listens for datagrams and connections on one port.
func listenBoth(a netip.Addr) (*net.UDPConn, *net.TCPListener, error) {
	var failed error
	for range 10 {
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		if err != nil {
			return nil, nil, err
		}
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(udp.LocalAddr().(*net.UDPAddr).AddrPort()))
		if err == nil {
			return udp, tcp, nil
		}
		udp.Close()
		failed = err
	}
	return nil, nil, failed
}

type relay struct {
	to    string
	slots chan struct{}
}

func (r *relay) serveUDP(ctx context.Context, c *net.UDPConn) {
	var g sync.WaitGroup
	defer g.Wait()
	buf := make([]byte, maxQuestion)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an answer that nobody wanted
		}
		select {
		case r.slots <- struct{}{}:
		default:
			continue // it asks again
		}
		question := slices.Clone(buf[:n])
		g.Go(func() {
			defer func() { <-r.slots }()
			if answer := r.ask(ctx, question); answer != nil {
				c.WriteToUDPAddrPort(answer, from)
			}
		})
	}
}

func (r *relay) ask(ctx context.Context, question []byte) []byte {
	c, err := (&net.Dialer{}).DialContext(ctx, "udp", r.to)
	if err != nil {
		return nil
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(relayWithin))
	if _, err := c.Write(question); err != nil {
		return nil
	}
	answer := make([]byte, 64<<10)
	n, err := c.Read(answer)
	if err != nil {
		return nil
	}
	return answer[:n]
}

func (r *relay) serveTCP(ctx context.Context, l *net.TCPListener) {
	var g sync.WaitGroup
	defer g.Wait()
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond): // out of descriptors, most likely
			}
			continue
		}
		select {
		case r.slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		g.Go(func() {
			defer func() { <-r.slots }()
			r.connection(ctx, c)
		})
	}
}

func (r *relay) connection(ctx context.Context, c *net.TCPConn) {
	defer c.Close()
	d := net.Dialer{Timeout: relayWithin}
	up, err := d.DialContext(ctx, "tcp", r.to)
	if err != nil {
		return
	}
	defer up.Close()
	stop := context.AfterFunc(ctx, func() { c.Close(); up.Close() })
	defer stop()
	deadline := time.Now().Add(4 * relayWithin)
	c.SetDeadline(deadline)
	up.SetDeadline(deadline)
	var g sync.WaitGroup
	defer g.Wait()
	g.Go(func() { io.Copy(up, c); up.(*net.TCPConn).CloseWrite() })
	io.Copy(c, up)
	c.CloseWrite()
}
