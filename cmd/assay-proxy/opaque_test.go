package main

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"assay.dev"
)

func TestOpaqueEcho(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	target := server.serve(0, echo)
	vip := w.service("echo", 7, assay.Detect, target, server)
	for _, to := range []netip.AddrPort{
		vip,
		netip.AddrPortFrom(server.Addrs[0], target), // directly
		netip.AddrPortFrom(server.Addrs[1], target), // over IPv6
		netip.AddrPortFrom(w.services["bank/echo"].VIPs[1], 7),
	} {
		c := client.mustDial(to)
		if got := exchange(t, c, "\x00\x01 hello"); got != "\x00\x01 hello" {
			t.Errorf("%s: %q", to, got)
		}
		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
		done := make(chan error, 1)
		go func() {
			_, err := c.Write(big)
			if err == nil {
				err = c.CloseWrite()
			}
			done <- err
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, big) {
			t.Errorf("%s: %d of %d bytes came back, %v", to, len(got), len(big), err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	r := client.report()
	if r.Counters.Handshakes == 0 || r.Counters.Handshakes > 2 {
		t.Errorf("%d handshakes, want one for each address", r.Counters.Handshakes)
	}
	out := sum(r, func(k assay.SignalKey) bool {
		return k.Service == "bank/echo" && k.Security == assay.MutualTLS && k.Peer == server.Identity && k.PeerArtifacts == assay.DigestOf([]byte("server"))
	})
	if out.Opened != 4 || out.BytesOut < 4*4<<20 || out.BytesIn != out.BytesOut {
		t.Errorf("client counted %+v", out)
	}
	eventually(t, "the connections are counted out", func() bool {
		in := sum(server.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Inbound && k.Peer == client.Identity && k.Service == "bank/echo"
		})
		return in.Requests == 4 && in.Failures == 0 && in.Open == 0 && in.InFlight == 0
	})
}

func TestClientIsSeen(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	target := server.serve(0, func(c *net.TCPConn) { io.WriteString(c, c.RemoteAddr().String()+" "+c.LocalAddr().String()) })
	vip := w.service("who", 80, assay.Detect, target, server)
	c := client.mustDial(vip)
	got, err := io.ReadAll(c)
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	want := local.String() + " " + netip.AddrPortFrom(server.Addrs[0], target).String()
	if err != nil || strings.ReplaceAll(strings.ReplaceAll(string(got), "[::ffff:", ""), "]", "") != want {
		t.Errorf("the application saw %q, %v; want %s", got, err, want)
	}
}
