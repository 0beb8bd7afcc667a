package agent

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// A question reaches the resolver on loopback unread, over both transports, and the
// answer comes from the address that was asked.
func TestRelayOfNames(t *testing.T) {
	resolver, streams, err := listenBoth(netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer streams.Close()
	defer resolver.Close()
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := resolver.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			resolver.WriteToUDPAddrPort(append([]byte("answer to "), b[:n]...), from)
		}
	}()
	go func() {
		for {
			c, err := streams.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			c.Write(append([]byte("answer to "), b...))
			c.Close()
		}
	}()

	udp, tcp, err := listenBoth(netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := relay{to: resolver.LocalAddr().String(), slots: make(chan struct{}, 2)}
	done := make(chan struct{}, 2)
	go func() { r.serveUDP(ctx, udp); done <- struct{}{} }()
	go func() { r.serveTCP(ctx, tcp); done <- struct{}{} }()
	for _, network := range []string{"udp", "tcp"} {
		c, err := net.Dial(network, udp.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write([]byte("question"))
		b := make([]byte, 64)
		if s, ok := c.(*net.TCPConn); ok {
			s.CloseWrite()
		}
		n, err := c.Read(b)
		if err != nil || !bytes.Equal(b[:n], []byte("answer to question")) {
			t.Errorf("%s: %q, %v", network, b[:n], err)
		}
		c.Close()
	}
	cancel()
	udp.Close()
	tcp.Close()
	<-done
	<-done
}
