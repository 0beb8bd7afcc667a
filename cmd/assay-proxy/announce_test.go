package main

import (
	be "encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"assay.dev"
)

// readProxyV2 reads a header of the PROXY protocol as a server does: the client's
// address, and the rest behind the addresses.
func readProxyV2(c net.Conn) (from netip.AddrPort, rest string, err error) {
	head := make([]byte, 16)
	if _, err = io.ReadFull(c, head); err != nil {
		return from, "", err
	}
	body := make([]byte, be.BigEndian.Uint16(head[14:]))
	if _, err = io.ReadFull(c, body); err != nil {
		return from, "", err
	}
	n := 4
	if head[13] == 0x21 {
		n = 16
	}
	a, _ := netip.AddrFromSlice(body[:n])
	return netip.AddrPortFrom(a, be.BigEndian.Uint16(body[2*n:])), string(head[:12]) + string(body[2*n+4:]), nil
}

// TestAnnounce: an application that wants to is told who its client is, before the
// client's own bytes, whoever that is.
func TestAnnounce(t *testing.T) {
	w := newWorld(t)
	client, server, outside := w.workload("client"), w.workload("server"), w.outsider()
	target := server.serve(0, func(c *net.TCPConn) {
		from, rest, err := readProxyV2(c)
		if err != nil {
			return
		}
		mesh := "outside"
		if strings.Contains(rest, "spiffe://") {
			mesh = rest[strings.Index(rest, "spiffe://"):]
		}
		if !strings.HasPrefix(rest, "\r\n\r\n\x00\r\nQUIT\n") {
			mesh = "not a header"
		}
		io.WriteString(c, from.String()+" "+mesh+"|")
		io.Copy(c, c)
	})
	vip := w.service("announced", 80, assay.Opaque, target, server)
	w.mu.Lock()
	s := w.services["bank/announced"]
	s.Ports = []assay.Port{{Name: "main", Port: 80, Protocol: assay.Opaque, ProxyProtocol: true}}
	w.services["bank/announced"] = s
	w.mu.Unlock()
	w.publish()
	told := func(from *workload, to netip.AddrPort, first string) (string, *net.TCPConn) {
		c := from.mustDial(to)
		io.WriteString(c, first)
		var b strings.Builder
		one := make([]byte, 1)
		for !strings.HasSuffix(b.String(), "|") {
			if _, err := io.ReadFull(c, one); err != nil {
				t.Fatalf("%s: %q, %v", to, b.String(), err)
			}
			b.Write(one)
		}
		return strings.TrimSuffix(b.String(), "|"), c
	}
	for _, to := range []netip.AddrPort{vip, netip.AddrPortFrom(server.Addrs[0], target), netip.AddrPortFrom(server.Addrs[1], target)} {
		// A client that announces somebody else is not the first to speak.
		const lie = "PROXY TCP4 192.0.2.66 192.0.2.67 1 2\r\n"
		got, c := told(client, to, lie)
		if want := c.LocalAddr().String() + " " + client.Identity.String(); got != want {
			t.Errorf("%s: the application was told %q, want %q", to, got, want)
		}
		b := make([]byte, len(lie))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != lie {
			t.Errorf("%s: then %q, %v", to, b, err)
		}
	}
	// A server that speaks first, to a client that is silent; and one from outside.
	if got, c := told(client, vip, ""); got != c.LocalAddr().String()+" "+client.Identity.String() {
		t.Errorf("a silent client: %q", got)
	}
	for _, first := range []string{"hello", ""} {
		if got, c := told(outside, netip.AddrPortFrom(server.Addrs[0], target), first); got != c.LocalAddr().String()+" outside" {
			t.Errorf("from outside: %q", got)
		}
	}
}
