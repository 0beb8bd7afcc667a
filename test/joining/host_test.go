package joining

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// What a program finds around itself: names, its process, other protocols.
var surroundings = []observation{
	{"dns-service", func(s *stage) string { return families(s.client.Resolve(s.t, "target")) }},
	{"dns-service-upper-case", func(s *stage) string { return families(s.client.Resolve(s.t, "TARGET")) }},
	{"dns-trailing-dot", func(s *stage) string { return families(s.client.Resolve(s.t, "target.")) }},
	{"dns-own-name", func(s *stage) string { return families(s.server.Resolve(s.t, "target")) }},
	{"dns-outside", func(s *stage) string {
		list := s.client.Resolve(s.t, "outside.test")
		if len(list) == 2 && list[0] == s.outside.IPv4 && list[1] == s.outside.IPv6 {
			return "its own addresses"
		}
		return fmt.Sprint(list)
	}},
	{"dns-outside-ipv4-only", func(s *stage) string { return families(s.client.Resolve(s.t, "v4only.test")) }},
	{"dns-nothing", func(s *stage) string {
		r := s.client.Exec(s.t, "getent", "hosts", "no-such-name.test")
		return fmt.Sprintf("exit code %d %s", r.Code, pace(r.Took))
	}},
	{"dns-nothing-short", func(s *stage) string {
		r := s.client.Exec(s.t, "getent", "hosts", "no-such-name")
		return fmt.Sprintf("exit code %d %s", r.Code, pace(r.Took))
	}},
	{"dns-localhost", func(s *stage) string {
		list := s.client.Resolve(s.t, "localhost")
		for _, a := range list {
			if !a.IsLoopback() {
				return fmt.Sprint(list)
			}
		}
		return "loopback"
	}},
	{"dns-server", func(s *stage) string {
		text := s.client.MustExec(s.t, "cat", "/etc/resolv.conf")
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
				if netip.MustParseAddr(f[1]).IsLoopback() {
					return "on loopback"
				}
				return "the network's"
			}
		}
		return "none"
	}},
	{"ping-address", func(s *stage) string { return s.udp(s.server.IPv4) }},
	{"ping-name", func(s *stage) string { return s.udp(s.client.Resolve(s.t, "target")[0]) }},
	{"udp-source-address", func(s *stage) string {
		return s.datagram(s.server.IPv4)
	}},
	{"user", func(s *stage) string { return s.status("Uid", "Gid", "Groups", "Umask") }},
	{"limits", func(s *stage) string { return s.fact("sh", "-c", "ulimit -n; ulimit -c; nice") }},
	{"descriptors", func(s *stage) string {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.client.PID))
		return fmt.Sprintf("%d open %s", len(entries), name(err))
	}},
	{"signals", func(s *stage) string { return s.status("SigBlk", "SigIgn") }},
	{"privileges", func(s *stage) string { return s.status("NoNewPrivs", "Seccomp", "CapBnd") }},
	{"interface-mtu", func(s *stage) string { return s.mtu() }},
	{"network-admin", func(s *stage) string { return s.command("ip", "link", "set", "lo", "mtu", "65000") }},
	{"listening-sockets", func(s *stage) string {
		out := s.client.MustExec(s.t, "ss", "-Hltun")
		return fmt.Sprintf("%d of somebody else's", strings.Count(out, "\n"))
	}},
}

func (s *stage) mtu() string {
	_, rest, _ := strings.Cut(s.fact("ip", "-o", "link", "show", "eth0"), " mtu ")
	mtu, _, _ := strings.Cut(rest, " ")
	return mtu
}

func families(list []netip.Addr) string {
	var v4, v6 int
	for _, a := range list {
		if a.Is4() {
			v4++
		} else {
			v6++
		}
	}
	return fmt.Sprintf("%d IPv4, %d IPv6", v4, v6)
}

// fact runs a program in the client's namespaces.
func (s *stage) fact(argv ...string) string {
	r := s.client.Exec(s.t, argv...)
	return strings.Join(strings.Fields(r.Stdout+r.Stderr), " ")
}

// command runs a program as a workload would itself, and reports its end.
func (s *stage) command(argv ...string) string {
	if s.w.Mesh == nil {
		r := s.client.Exec(s.t, argv...)
		return fmt.Sprintf("exit code %d", r.Code)
	}
	r := s.w.Mesh.CLI(s.t, append([]string{"run", "--service", "once", "--"}, argv...)...)
	return fmt.Sprintf("exit code %d", r.Code)
}

// status reads lines of /proc/PID/status of the client's own process.
func (s *stage) status(keys ...string) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.client.PID))
	if err != nil {
		return name(err)
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		for _, k := range keys {
			if k == key {
				list = append(list, key+" "+strings.TrimSpace(value))
			}
		}
	}
	return strings.Join(list, ", ")
}

// udp asks a closed port: the host answers that it is closed, if it is there.
func (s *stage) udp(to netip.Addr) string {
	var err error
	s.client.In(func() error {
		var c net.Conn
		if c, err = net.DialTimeout("udp", netip.AddrPortFrom(to, 9).String(), patience); err != nil {
			return nil
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		c.Write([]byte("anybody there?"))
		_, err = c.Read(make([]byte, 1))
		return nil
	})
	return "a datagram to a closed port: " + name(err)
}

// datagram sends one to the server, which answers with whom it saw.
func (s *stage) datagram(to netip.Addr) string {
	var pc net.PacketConn
	if err := s.server.In(func() (err error) { pc, err = net.ListenPacket("udp", ":7300"); return err }); err != nil {
		return name(err)
	}
	defer pc.Close()
	pc.SetDeadline(time.Now().Add(2 * time.Second))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, from, err := pc.ReadFrom(make([]byte, 16))
		if err == nil {
			ip := from.(*net.UDPAddr).AddrPort().Addr().Unmap()
			pc.WriteTo([]byte(fmt.Sprint(ip == s.client.IPv4)), from)
		}
	}()
	answer := ""
	s.client.In(func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, 7300).String())
		if err != nil {
			answer = name(err)
			return nil
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		c.Write([]byte("hello"))
		b := make([]byte, 16)
		n, err := c.Read(b)
		answer = fmt.Sprintf("the server sees the client's address: %s %s", b[:n], name(err))
		return nil
	})
	<-done
	return answer
}
