package lab

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// Names is a DNS server on the lab's uplink, over UDP: what a company's resolver
// is to a mesh. It knows the names that were set, answers NXDOMAIN for all else,
// and counts what it was asked.
type Names struct {
	conn *net.UDPConn
	done chan struct{}

	mu    sync.Mutex
	addrs map[string][]netip.Addr
	asked map[string]int
}

func newNames(s *Space) (*Names, error) {
	n := &Names{done: make(chan struct{}), addrs: map[string][]netip.Addr{}, asked: map[string]int{}}
	err := s.In(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "dns")
		defer f.Close()
		addr := netip.MustParseAddr(UplinkIPv4).As4()
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 53, Addr: addr}); err != nil {
			return err
		}
		pc, err := net.FilePacketConn(f)
		if err != nil {
			return err
		}
		n.conn = pc.(*net.UDPConn)
		return nil
	})
	if err != nil {
		return nil, err
	}
	go n.serve()
	return n, nil
}

// Set gives a name its addresses.
func (n *Names) Set(name string, addrs ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs[strings.TrimSuffix(name, ".")] = addrs
}

// Asked returns how often the server was asked for a name.
func (n *Names) Asked(name string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked[name]
}

// Close ends the server and waits.
func (n *Names) Close() {
	n.conn.Close()
	<-n.done
}

func (n *Names) serve() {
	defer close(n.done)
	buf := make([]byte, 4096)
	for {
		size, from, err := n.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if answer, err := n.answer(buf[:size]); err == nil {
			n.conn.WriteToUDPAddrPort(answer, from)
		}
	}
}

func (n *Names) answer(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	n.mu.Lock()
	addrs, known := n.addrs[name]
	n.asked[name]++
	n.mu.Unlock()
	reply := dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	if !known {
		reply.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, reply)
	b.EnableCompression()
	if err := errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers()); err != nil {
		return nil, err
	}
	rh := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 5}
	for _, a := range addrs {
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			err = b.AResource(rh, dnsmessage.AResource{A: a.As4()})
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			err = b.AAAAResource(rh, dnsmessage.AAAAResource{AAAA: a.As16()})
		}
		if err != nil {
			return nil, err
		}
	}
	return b.Finish()
}
