package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// testProxy is a proxy as small as the link allows, run as a process of its own by the
// agent under test. It asks for one certificate, answers what the workload dials with
// the address that was dialled, and relays what comes in to the application, from the
// client's address.
type testProxy struct {
	conn      *link.Conn
	configure link.Configure
	roles     []string
	files     []int
	versions  link.Ack
	services  map[string]assay.Service
	mode      assay.Mode
	accepting bool
	draining  bool
	listening []net.Listener
	relays    sync.WaitGroup
	csr       []byte

	mu       sync.Mutex
	requests uint64
	started  time.Time
	serial   string
}

func runTestProxy() {
	f := os.NewFile(3, "link")
	conn, err := link.FileConn(f)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	p := &testProxy{conn: conn, services: map[string]assay.Service{}, started: time.Now()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err == nil {
		p.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	}
	for err == nil {
		err = p.speak()
		p.conn.Close()
		if p.draining {
			select {} // to the end of the last relay
		}
		if p.configure.AgentSocket == "" {
			break
		}
		// An agent that a test restarts is back in seconds; after that nobody is left.
		for gone := time.Now(); ; {
			time.Sleep(50 * time.Millisecond)
			if p.conn, err = link.Dial(p.configure.AgentSocket); err == nil {
				break
			}
			if time.Since(gone) > time.Minute {
				return
			}
		}
	}
	fmt.Fprintln(os.Stderr, "test proxy:", err)
	os.Exit(1)
}

// drain ends the process with its last connection, or at the deadline.
func (p *testProxy) drain(d link.Drain) {
	p.draining = true
	for _, l := range p.listening {
		l.Close()
	}
	time.AfterFunc(time.Until(d.Deadline), func() { os.Exit(0) })
	go func() { p.relays.Wait(); os.Exit(0) }()
}

func (p *testProxy) speak() error {
	hello := link.Hello{PID: os.Getpid(), Build: "test", Workload: p.configure.Workload, Listeners: p.roles, Bundle: p.versions.Bundle}
	if err := p.conn.Send(link.KindHello, 0, hello, p.files...); err != nil {
		return nil
	}
	for {
		m, err := p.conn.Receive()
		if err != nil {
			return nil
		}
		switch m.Kind {
		case link.KindConfigure:
			p.configure = link.Configure{}
			if err := m.Decode(&p.configure); err != nil {
				return err
			}
			p.mode = p.configure.Config.Mode
			if len(m.Files) > 0 {
				p.roles, p.files = p.configure.Listeners, m.Files
				m.Files = nil
			}
			if p.accepting {
				p.conn.Send(link.KindReady, 0, nil)
			}
		case link.KindTable:
			var t link.Table
			m.Decode(&t)
			p.versions.Table = t.Version
		case link.KindServices:
			var s link.Services
			if err := m.Decode(&s); err != nil {
				return err
			}
			if s.Full {
				clear(p.services)
			}
			if s.Config != nil {
				p.mode = s.Config.Mode
			}
			for _, x := range s.Upsert {
				p.services[x.Key()] = x
			}
			p.versions.Services = s.Version
			p.conn.Send(link.KindAck, 0, p.versions)
			p.accept()
		case link.KindBundle:
			var b link.Bundle
			m.Decode(&b)
			p.versions.Bundle = b.Version
			p.conn.Send(link.KindAck, 0, p.versions)
		case link.KindCertificate:
			var c link.Certificate
			m.Decode(&c)
			if c.Refused != "" {
				go func(conn *link.Conn) {
					time.Sleep(50 * time.Millisecond)
					conn.Send(link.KindCSR, m.ID+1, link.CSR{DER: p.csr})
				}(p.conn)
				break
			}
			p.mu.Lock()
			p.serial = fmt.Sprintf("%x", c.Chain[0])
			p.mu.Unlock()
		case link.KindRenew:
			p.conn.Send(link.KindCSR, 1000, link.CSR{DER: p.csr})
		case link.KindReportNow:
			p.mu.Lock()
			r := link.Report{Started: p.started, Counters: assay.Counters{Handshakes: p.requests}}
			r.Counters.Refusals = map[string]uint64{"mode " + string(p.mode): 1, fmt.Sprint("transition ", p.configure.Transition): 1}
			r.Signals = []assay.Signals{{SignalKey: assay.SignalKey{Direction: assay.Inbound, Service: "default/web", Protocol: assay.Opaque, Security: assay.Plaintext}, Requests: p.requests}}
			p.mu.Unlock()
			p.conn.Send(link.KindReport, m.ID, r)
		case link.KindDrain:
			var d link.Drain
			m.Decode(&d)
			p.drain(d)
		}
		m.Discard()
	}
}

func (p *testProxy) accept() {
	if p.accepting {
		return
	}
	p.accepting = true
	for i, role := range p.roles {
		if role == link.ListenDNSUDP {
			continue
		}
		fd, _ := unix.Dup(p.files[i])
		l, err := net.FileListener(os.NewFile(uintptr(fd), role))
		if err != nil {
			fmt.Fprintln(os.Stderr, role, err)
			os.Exit(1)
		}
		p.listening = append(p.listening, l)
		go p.acceptLoop(role, l)
	}
	p.conn.Send(link.KindReady, 0, nil)
	p.conn.Send(link.KindCSR, 1, link.CSR{DER: p.csr})
}

func (p *testProxy) acceptLoop(role string, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		p.relays.Go(func() { p.serve(role, c.(*net.TCPConn)) })
	}
}

func (p *testProxy) serve(role string, c *net.TCPConn) {
	defer c.Close()
	to := originalDst(c)
	if role == link.ListenOutbound {
		// A reader: what the workload dialled. "exit" ends the proxy.
		fmt.Fprintf(c, "outbound %s\n", to)
		return
	}
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		raw.Control(func(fd uintptr) {
			level, opt := unix.SOL_IP, unix.IP_TRANSPARENT
			if from.Addr().Is6() {
				level, opt = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
			}
			failed = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(p.configure.OwnMark)),
				unix.SetsockoptInt(int(fd), level, opt, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		})
		return failed
	}}
	up, err := d.DialContext(context.Background(), "tcp", to.String())
	if err != nil {
		fmt.Fprintln(os.Stderr, "dial application:", err)
		c.SetLinger(0)
		return
	}
	defer up.Close()
	p.mu.Lock()
	p.requests++
	p.mu.Unlock()
	done := make(chan struct{})
	go func() { io.Copy(up, c); up.(*net.TCPConn).CloseWrite(); close(done) }()
	io.Copy(c, up)
	c.CloseWrite()
	<-done
}

func originalDst(c *net.TCPConn) netip.AddrPort {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}
	}
	var out netip.AddrPort
	raw.Control(func(fd uintptr) {
		if c.LocalAddr().(*net.TCPAddr).IP.To4() != nil {
			// struct sockaddr_in fits where getsockopt puts an ipv6_mreq.
			v, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST)
			if err == nil {
				out = netip.AddrPortFrom(netip.AddrFrom4([4]byte(v.Multiaddr[4:8])), uint16(v.Multiaddr[2])<<8|uint16(v.Multiaddr[3]))
			}
			return
		}
		v, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST)
		if err == nil {
			port := v.Addr.Port<<8 | v.Addr.Port>>8
			out = netip.AddrPortFrom(netip.AddrFrom16(v.Addr.Addr), port)
		}
	})
	return out
}
