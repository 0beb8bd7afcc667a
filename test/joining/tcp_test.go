package joining

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// observation is one thing to look at; it returns what it saw in words that do
// not depend on addresses and times.
type observation struct {
	id   string
	make func(s *stage) string
}

var connections = []observation{
	{"source-address-ipv4", func(s *stage) string { return s.source(s.client.Target(s.t, "target", portBytes)) }},
	{"source-address-ipv6", func(s *stage) string {
		for _, a := range s.client.Resolve(s.t, "target") {
			if a.Is6() {
				return s.source(netip.AddrPortFrom(a, portBytes))
			}
		}
		return "no IPv6 address"
	}},
	{"source-address-by-address", func(s *stage) string { return s.source(s.addr(portBytes)) }},
	{"source-address-undeclared-port", func(s *stage) string { return s.source(s.addr(portHidden)) }},
	{"source-port", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			port := c.RemoteAddr().(*net.TCPAddr).Port
			fmt.Fprintf(c, "%05d", port)
			return ""
		}, func(c *net.TCPConn) string {
			b := make([]byte, 5)
			if _, err := io.ReadFull(c, b); err != nil {
				return name(err)
			}
			if string(b) == fmt.Sprintf("%05d", c.LocalAddr().(*net.TCPAddr).Port) {
				return "the client's"
			}
			return "another"
		})
	}},
	{"server-own-address", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			a := c.LocalAddr().(*net.TCPAddr).AddrPort()
			if a.Addr().Unmap() == s.server.IPv4 && a.Port() == portBytes {
				return "the server's own address and port"
			}
			return "another: " + a.String()
		}, func(c *net.TCPConn) string { c.CloseWrite(); readAll(c); return "" })
	}},
	{"peer-address", func(s *stage) string {
		to := s.service(portBytes)
		return s.talkTo(to, quiet, func(c *net.TCPConn) string {
			if c.RemoteAddr().(*net.TCPAddr).AddrPort() == to {
				return "as dialled"
			}
			return "another"
		})
	}},
	{"refused-service-port", func(s *stage) string { return s.connect(s.service(portSilent)) }},
	{"refused-undeclared-port", func(s *stage) string { return s.connect(s.service(portOther)) }},
	{"refused-address", func(s *stage) string { return s.connect(s.addr(portSilent)) }},
	{"undeclared-port-by-name", func(s *stage) string { return s.greet(s.service(portHidden)) }},
	{"undeclared-port-by-address", func(s *stage) string { return s.greet(s.addr(portHidden)) }},
	{"refused-outside", func(s *stage) string { return s.connect(netip.AddrPortFrom(s.outside.IPv4, 9)) }},
	{"no-host-outside", func(s *stage) string { return s.connect(netip.MustParseAddrPort("10.90.0.250:9")) }},
	{"no-route-outside", func(s *stage) string { return s.connect(netip.MustParseAddrPort("203.0.113.9:9")) }},
	{"no-host-beside", func(s *stage) string {
		// An address of the server's own network that nobody has.
		a := s.server.IPv4.As4()
		a[3] = 251
		return s.connect(netip.AddrPortFrom(netip.AddrFrom4(a), 9))
	}},
	{"reset-by-server", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			io.ReadFull(c, make([]byte, 4))
			reset(c)
			return ""
		}, func(c *net.TCPConn) string {
			c.Write([]byte("\x00\x01\x02\x03"))
			_, end := readAll(c)
			return "the client sees " + end
		})
	}},
	{"reset-by-server-at-accept", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string { reset(c); return "" }, func(c *net.TCPConn) string {
			_, end := readAll(c)
			return "the client sees " + end
		})
	}},
	{"reset-by-client", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			c.Write([]byte{1})
			io.ReadFull(c, make([]byte, 4))
			c.Write([]byte{2})
			_, end := readAll(c)
			return "the server sees " + end
		}, func(c *net.TCPConn) string {
			c.Write([]byte("\x00\x01\x02\x03"))
			io.ReadFull(c, make([]byte, 2))
			reset(c)
			return ""
		})
	}},
	{"close-with-unread-data", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			io.ReadFull(c, make([]byte, 4)) // more is there, unread: the kernel resets
			c.Close()
			return ""
		}, func(c *net.TCPConn) string {
			c.Write(bytes.Repeat([]byte{0}, 4096))
			_, end := readAll(c)
			return "the client sees " + end
		})
	}},
	{"half-close-by-client", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			b, end := readAll(c)
			c.Write(bytes.Repeat([]byte{7}, 300000))
			return fmt.Sprintf("the server has %d bytes and %s", len(b), end)
		}, func(c *net.TCPConn) string {
			c.Write(bytes.Repeat([]byte{6}, 200000))
			c.CloseWrite()
			b, end := readAll(c)
			return fmt.Sprintf("the client has %d bytes and %s", len(b), end)
		})
	}},
	{"half-close-by-server", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			c.Write(bytes.Repeat([]byte{7}, 300000))
			c.CloseWrite()
			b, end := readAll(c)
			return fmt.Sprintf("the server has %d bytes and %s", len(b), end)
		}, func(c *net.TCPConn) string {
			b, end := readAll(c)
			c.Write(bytes.Repeat([]byte{6}, 200000))
			c.CloseWrite()
			return fmt.Sprintf("the client has %d bytes and %s", len(b), end)
		})
	}},
	{"half-close-before-any-byte", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			b, end := readAll(c)
			c.Write([]byte("late answer"))
			return fmt.Sprintf("the server has %d bytes and %s", len(b), end)
		}, func(c *net.TCPConn) string {
			c.CloseWrite()
			b, end := readAll(c)
			return fmt.Sprintf("the client has %q and %s", b, end)
		})
	}},
	{"send-and-close", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			b, end := readAll(c)
			return fmt.Sprintf("the server has %d bytes and %s", len(b), end)
		}, func(c *net.TCPConn) string {
			c.Write(bytes.Repeat([]byte{6}, 50000))
			c.Close()
			return ""
		})
	}},
	{"connect-and-close", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			_, end := readAll(c)
			return "accepted, " + end
		}, func(c *net.TCPConn) string { c.Close(); return "" })
	}},
	{"server-first", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			io.WriteString(c, "220 ready\r\n")
			b := make([]byte, 6)
			_, err := io.ReadFull(c, b)
			return fmt.Sprintf("the server has %q %s", b, name(err))
		}, func(c *net.TCPConn) string {
			b := make([]byte, 11)
			_, err := io.ReadFull(c, b)
			io.WriteString(c, "HELO\r\n")
			return fmt.Sprintf("the client has %q %s", b, name(err))
		})
	}},
	{"both-silent-then-server", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			// Nobody says anything for longer than any detection would wait.
			c.SetReadDeadline(time.Now().Add(1200 * time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			io.WriteString(c, "late")
			return "the server has " + name(err)
		}, func(c *net.TCPConn) string {
			b := make([]byte, 4)
			_, err := io.ReadFull(c, b)
			return fmt.Sprintf("the client has %q %s", b, name(err))
		})
	}},
	{"segment-sized-writes", func(s *stage) string { return s.echo(portBytes, sizes(1440, 1470, 3)) }},
	{"odd-sized-writes", func(s *stage) string {
		return s.echo(portBytes, append(sizes(1, 70, 1), 16383, 16384, 16385, 65535, 65537, 262143, 262145))
	}},
	{"small-exchanges", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string { io.Copy(c, c); return "" }, func(c *net.TCPConn) string {
			c.SetNoDelay(true)
			var took []time.Duration
			b := []byte{0}
			for range 200 {
				began := time.Now()
				c.Write(b)
				if _, err := io.ReadFull(c, b); err != nil {
					return name(err)
				}
				took = append(took, time.Since(began))
			}
			c.CloseWrite()
			slices.Sort(took)
			// Whoever waits for more bytes does so each time; a busy machine does not.
			if m := took[len(took)/10]; m > 5*time.Millisecond {
				return fmt.Sprintf("a byte there and back takes %s", m)
			}
			return "a byte there and back takes under 5 ms"
		})
	}},
	{"kept-connection", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string { io.Copy(c, c); return "" }, func(c *net.TCPConn) string {
			b := make([]byte, 3)
			for range 3 {
				c.Write([]byte{0, 1, 2})
				if _, err := io.ReadFull(c, b); err != nil {
					return name(err)
				}
				time.Sleep(1500 * time.Millisecond) // the silence is what is observed
			}
			c.CloseWrite()
			return "alive after silence"
		})
	}},
	{"urgent-byte", func(s *stage) string {
		return s.talk(portBytes, func(c *net.TCPConn) string {
			b, end := readAll(c)
			return fmt.Sprintf("the server's stream has %q and %s", b, end)
		}, func(c *net.TCPConn) string {
			raw, err := c.SyscallConn()
			if err != nil {
				return name(err)
			}
			io.WriteString(c, "a\x00")
			raw.Write(func(fd uintptr) bool { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil); return true })
			io.WriteString(c, "b")
			c.CloseWrite()
			readAll(c)
			return name(err)
		})
	}},
	{"back-pressure", func(s *stage) string {
		release := make(chan struct{})
		return s.talk(portBytes, func(c *net.TCPConn) string {
			c.SetReadBuffer(64 << 10)
			<-release
			return ""
		}, func(c *net.TCPConn) string {
			defer close(release)
			c.SetWriteBuffer(64 << 10)
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			var sent int
			block := make([]byte, 64<<10)
			for sent < 256<<20 {
				n, err := c.Write(block)
				sent += n
				if err != nil {
					if sent > 32<<20 {
						return fmt.Sprintf("%d MB pass into nowhere, then the writer waits", sent>>20)
					}
					return "the writer has to wait for a reader that does not read"
				}
			}
			return "the writer never waits"
		})
	}},
	{"hairpin-own-address", func(s *stage) string { return s.own(s.server.IPv4.String()) }},
	{"hairpin-loopback", func(s *stage) string { return s.own("127.0.0.1") }},
	{"hairpin-own-name", func(s *stage) string {
		list := s.server.Resolve(s.t, "target")
		if len(list) == 0 {
			return "no address"
		}
		return s.own(list[0].String())
	}},
	{"outside-echo", func(s *stage) string {
		l := s.outside.Listen(s.t, 9000)
		defer l.Close()
		saw := make(chan string, 1)
		go func() {
			c, err := l.AcceptTCP()
			if err != nil {
				saw <- name(err)
				return
			}
			defer c.Close()
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			io.Copy(c, c)
			if from == s.client.IPv4 {
				saw <- "from the client's address"
			} else if from.String() == "10.90.0.1" {
				saw <- "from the host's address"
			} else {
				saw <- "from " + from.String()
			}
		}()
		c, err := s.client.Dial(netip.AddrPortFrom(s.outside.IPv4, 9000))
		if err != nil {
			return "connect: " + name(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "\x00ping")
		c.CloseWrite()
		b, end := readAll(c)
		return join(fmt.Sprintf("%q and %s", b, end), <-saw)
	}},
	{"called-from-outside", func(s *stage) string {
		// A host that is not in the mesh calls the server by its address.
		handle := func(c *net.TCPConn) {
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			fmt.Fprintf(c, "%v", from == s.outside.IPv4)
		}
		s.handler[portBytes].Store(&handle)
		defer s.handler[portBytes].Store(nil)
		c, err := s.outside.Dial(s.addr(portBytes))
		if err != nil {
			return "connect: " + name(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		b, end := readAll(c)
		return fmt.Sprintf("the server sees the caller's address: %s, %s", b, end)
	}},
}

// source makes a connection and says whose address the server saw.
func (s *stage) source(to netip.AddrPort) string {
	return s.talkTo(to, func(c *net.TCPConn) string {
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if from == s.client.IPv4 || from == s.client.IPv6 {
			return "the client's own address"
		}
		return "another: " + from.String()
	}, func(c *net.TCPConn) string { c.CloseWrite(); readAll(c); return "" })
}

func (s *stage) greet(to netip.AddrPort) string {
	return s.talkTo(to, func(c *net.TCPConn) string { c.Write([]byte{1, 2, 3}); return "" }, func(c *net.TCPConn) string {
		b, end := readAll(c)
		return fmt.Sprintf("%d bytes and %s", len(b), end)
	})
}

// own lets the server call itself.
func (s *stage) own(addr string) string {
	handle := func(c *net.TCPConn) {
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		switch {
		case from.IsLoopback():
			io.WriteString(c, "from loopback")
		case from == s.server.IPv4 || from == s.server.IPv6:
			io.WriteString(c, "from its own address")
		default:
			io.WriteString(c, "from "+from.String())
		}
	}
	s.handler[portBytes].Store(&handle)
	defer s.handler[portBytes].Store(nil)
	c, err := s.server.Dial(netip.AddrPortFrom(netip.MustParseAddr(addr), portBytes))
	if err != nil {
		return "connect: " + name(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	b, end := readAll(c)
	return join(string(b), end)
}

func sizes(from, to, step int) []int {
	var list []int
	for n := from; n <= to; n += step {
		list = append(list, n)
	}
	return list
}

// echo sends writes of the given sizes and compares what comes back.
func (s *stage) echo(port int, sizes []int) string {
	return s.talk(port, func(c *net.TCPConn) string { io.Copy(c, c); c.CloseWrite(); return "" }, func(c *net.TCPConn) string {
		c.SetNoDelay(true)
		sent, got := sha256.New(), sha256.New()
		done := make(chan error, 1)
		go func() { _, err := io.Copy(got, c); done <- err }()
		for i, n := range sizes {
			p := []byte(strings.Repeat(string(rune(1+i%100)), n))[:n]
			sent.Write(p)
			if _, err := c.Write(p); err != nil {
				return name(err)
			}
		}
		c.CloseWrite()
		if err := <-done; err != nil {
			return name(err)
		}
		if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			return "other bytes came back"
		}
		return "the same bytes come back"
	})
}
