package attacks

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"assay.dev/proxy/mtls"
	"assay.dev/proxy/mux"
	"assay.dev/test/lab"
)

// header is what the client's real proxy would open a stream with.
func (a *arena) header() []byte {
	return header(4, port, netip.AddrPortFrom(a.server.IPv4, port), "default/"+a.server.Name)
}

// header writes a stream header by hand: the format is part of what is attacked
// (package proxy's doc has it).
func header(protocol byte, dialled uint16, destination netip.AddrPort, service string) []byte {
	b := []byte{1, 0, protocol}
	b = binary.BigEndian.AppendUint16(b, dialled)
	b = binary.BigEndian.AppendUint16(b, 0)
	addr := destination.Addr().As4()
	b = append(append(b, 4), addr[:]...)
	b = binary.BigEndian.AppendUint16(b, destination.Port())
	return append(append(b, byte(len(service))), service...)
}

// openStream connects to the server's proxy from the client's address, opens one
// stream and waits for an answer to what it sends.
func (a *arena) openStream(t *testing.T, certs []tls.Certificate, open []byte) error {
	return a.openStreamTo(t, netip.AddrPortFrom(a.server.IPv4, port), certs, open, []byte("evil but encrypted"))
}

func (a *arena) openStreamTo(t *testing.T, to netip.AddrPort, certs []tls.Certificate, open, data []byte) error {
	t.Helper()
	raw, err := dialPast(a.client, to)
	if err != nil {
		return err
	}
	defer raw.Close()
	conn := tls.Client(raw, &tls.Config{
		Certificates: certs, InsecureSkipVerify: true, // an evil client does not care
		MinVersion: tls.VersionTLS13, NextProtos: []string{mtls.ALPN},
	})
	ctx := within(t)
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	session := mux.New(conn, true, mux.Config{}, nil)
	ended := make(chan error, 1)
	go func() { ended <- session.Run() }()
	defer func() { session.Close(errors.New("done")); <-ended }()
	answer := make(echoed, 1)
	if _, _, err := session.Open(open, data, false, answer); err != nil {
		return err
	}
	select {
	case err := <-answer:
		return err
	case err := <-ended:
		ended <- err
		return fmt.Errorf("session: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// echoed takes the first thing that happens to a stream.
type echoed chan error

func (e echoed) tell(err error) {
	select {
	case e <- err:
	default:
	}
}
func (e echoed) Received(st mux.Stream, p []byte, fin bool) {
	st.Consumed(len(p))
	if len(p) > 0 {
		e.tell(nil)
	} else if fin {
		e.tell(errors.New("closed without an answer"))
	}
}
func (e echoed) Reset(_ mux.Stream, code mux.Code) { e.tell(fmt.Errorf("reset: %s", code)) }
func (e echoed) Writable(mux.Stream)               {}

// TestEvilHeader has the right identity and lies in the stream's header: about the
// protocol, about who is meant, or about everything.
func TestEvilHeader(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed, "--metrics", metricsAddress)
	m := newMint(t, w.Mesh, 0)
	for _, lie := range []struct {
		name string
		open func(a *arena) []byte
		data string
		// reason is what the server's proxy counts. None: the lie is a mere hint, the bytes
		// may reach the server, and only the server.
		reason string
	}{
		{"another host's address", func(a *arena) []byte {
			return header(4, port, netip.AddrPortFrom(a.client.IPv4, 22), "default/"+a.server.Name)
		}, "x", ""},
		{"another service", func(a *arena) []byte {
			return header(4, port, netip.AddrPortFrom(a.server.IPv4, port), "default/"+a.client.Name)
		}, "x", ""},
		{"another port", func(a *arena) []byte {
			return header(4, 22, netip.AddrPortFrom(a.server.IPv4, 22), "default/"+a.server.Name)
		}, "x", ""},
		{"HTTP that is none", func(a *arena) []byte {
			return header(1, port, netip.AddrPortFrom(a.server.IPv4, port), "default/"+a.server.Name)
		}, "\x16\x03\x01 not HTTP at all\r\n\r\n", "http-method"},
		{"smuggled HTTP", func(a *arena) []byte {
			return header(1, port, netip.AddrPortFrom(a.server.IPv4, port), "default/"+a.server.Name)
		}, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "http-length-and-coding"},
		{"no protocol", func(a *arena) []byte { return header(0, port, netip.AddrPortFrom(a.server.IPv4, port), "") }, "x", "bad-header"},
		{"an unknown protocol", func(a *arena) []byte { return header(9, port, netip.AddrPortFrom(a.server.IPv4, port), "") }, "x", "bad-header"},
		{"no port", func(a *arena) []byte { return header(4, 0, netip.AddrPortFrom(a.server.IPv4, port), "") }, "x", "bad-header"},
		{"a service that is no name", func(a *arena) []byte {
			return header(4, port, netip.AddrPortFrom(a.server.IPv4, port), "../../etc")
		}, "x", "bad-header"},
		{"a newer version", func(a *arena) []byte { return append([]byte{2}, a.header()[1:]...) }, "x", "bad-header"},
		{"half a header", func(a *arena) []byte { return a.header()[:7] }, "x", "bad-header"},
		{"nothing", func(*arena) []byte { return nil }, "x", "bad-header"},
		{"too much", func(*arena) []byte { return []byte(strings.Repeat("\x01", 4096)) }, "x", "bad-header"},
	} {
		t.Run(lie.name, func(t *testing.T) {
			a := newArena(t, w)
			cert := []tls.Certificate{m.workload(t, a.client.Name)}
			err := a.openStreamTo(t, netip.AddrPortFrom(a.server.IPv4, port), cert, lie.open(a), []byte(lie.data))
			if lie.reason == "" {
				if err != nil {
					t.Errorf("a hint decided: %v", err)
				}
			} else {
				if a.served.Load() > 0 {
					t.Errorf("%d bytes reached the application", a.served.Load())
				}
				a.mustBeCounted(t, a.server, lie.reason)
			}
			a.capture.ExpectNone(t)
			// The proxy is as well as before.
			if _, end := a.attempt(); end != "answered" {
				t.Errorf("afterwards an honest connection ends with %s", end)
			}
		})
	}
}
