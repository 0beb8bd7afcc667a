package joining

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// The requests are written byte by byte as a program might, and the server shows
// what arrived.
var exchanges = []observation{
	{"http-request-bytes", func(s *stage) string {
		return s.exchange("GET /a%2Fb//c?x=1&&y HTTP/1.1\r\nhOsT: target:7000\r\nX-Twice: 1\r\nACCEPT:*/*\r\nx-twice:   2  \r\nX-Empty:\r\nConnection: keep-alive\r\nVia: 1.0 older\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n", okAnswer)
	}},
	{"http-answer-bytes", func(s *stage) string {
		return s.answer("GET / HTTP/1.1\r\nHost: target\r\n\r\n", "HTTP/1.1 200 All  Right\r\nserver: x\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\nX-Odd:  spaced \r\ncontent-length: 3\r\nDATE: never\r\n\r\nabc")
	}},
	{"http-no-reason", func(s *stage) string {
		return s.answer("GET / HTTP/1.1\r\nHost: target\r\n\r\n", "HTTP/1.1 204 \r\nX: y\r\n\r\n")
	}},
	{"http-chunked-request-bytes", func(s *stage) string {
		return s.exchange("POST /c HTTP/1.1\r\nHost: target\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5;name=value\r\nhello\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 15\r\n\r\n", okAnswer)
	}},
	{"http-chunked-answer-bytes", func(s *stage) string {
		return s.answer("GET / HTTP/1.1\r\nHost: target\r\nTE: trailers\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x\r\nd\r\n0\r\nX-T: 1\r\n\r\n")
	}},
	{"http-answer-until-close", func(s *stage) string {
		return s.answer("GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK\r\nX: y\r\n\r\nuntil the end")
	}},
	{"http-interim-answers", func(s *stage) string {
		return s.answer("GET / HTTP/1.1\r\nHost: target\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	}},
	{"http-expect-continue", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			head := readHead(r)
			io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
			body := make([]byte, 4)
			_, err := io.ReadFull(r, body)
			io.WriteString(c, okAnswer)
			return fmt.Sprintf("asked %v, body %q %s", strings.Contains(head, "Expect: 100-continue"), body, name(err))
		}, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			io.WriteString(c, "PUT / HTTP/1.1\r\nHost: target\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
			first := readHead(r)
			io.WriteString(c, "data")
			return fmt.Sprintf("answers %q %q", first, readHead(r))
		})
	}},
	{"http-early-answer", func(s *stage) string {
		// The server refuses before the body has come, and closes.
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			readHead(r)
			io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			c.CloseWrite()
			io.Copy(io.Discard, r)
			return ""
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 1000000\r\n\r\nstart")
			b, end := readAll(c)
			c.Close()
			return fmt.Sprintf("%q and %s", firstLine(string(b)), end)
		})
	}},
	{"http-kept-connection", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			n := 0
			for n < 3 && readHead(r) != "" {
				n++
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d", n)
			}
			return fmt.Sprintf("%d requests on one connection", n)
		}, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			for range 3 {
				io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
				readHead(r)
				r.ReadByte()
			}
			c.CloseWrite()
			return ""
		})
	}},
	{"http-pipelined", func(s *stage) string {
		const count, size = 100, 40000
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			for i := range count {
				head := readHead(r)
				if !strings.HasPrefix(head, fmt.Sprintf("POST /%d ", i)) {
					return fmt.Sprintf("request %d is %q", i, firstLine(head))
				}
				if _, err := io.CopyN(io.Discard, r, size); err != nil {
					return name(err)
				}
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nX-I: %d\r\nContent-Length: 0\r\n\r\n", i)
			}
			return "all requests in order"
		}, func(c *net.TCPConn) string {
			go func() {
				for i := range count {
					fmt.Fprintf(c, "POST /%d HTTP/1.1\r\nHost: target\r\nContent-Length: %d\r\n\r\n%s", i, size, strings.Repeat("b", size))
				}
			}()
			r := bufio.NewReader(c)
			for i := range count {
				if head := readHead(r); !strings.Contains(head, fmt.Sprintf("X-I: %d\r\n", i)) {
					return fmt.Sprintf("answer %d is %q", i, head)
				}
			}
			return "all answers in order"
		})
	}},
	{"http-server-closes-idle", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			readHead(bufio.NewReader(c))
			io.WriteString(c, okAnswer)
			return ""
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
			b, end := readAll(c)
			return fmt.Sprintf("%q and %s", b, end)
		})
	}},
	{"http-reset-in-answer", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			readHead(bufio.NewReader(c))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
			c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)) // let it arrive
			c.Read(make([]byte, 1))
			reset(c)
			return ""
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
			b, end := readAll(c)
			return fmt.Sprintf("%d bytes of the body and %s", max(0, len(b)-len("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")), end)
		})
	}},
	{"http-close-in-answer", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			readHead(bufio.NewReader(c))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
			return ""
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
			b, _ := readAll(c)
			return fmt.Sprintf("%d bytes of the body, then the end", max(0, len(b)-len("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")))
		})
	}},
	{"http-no-answer", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			readHead(bufio.NewReader(c))
			return ""
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 0\r\n\r\n")
			b, end := readAll(c)
			return fmt.Sprintf("%q and %s", b, end)
		})
	}},
	{"http-upgrade", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			head := readHead(r)
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: odd/1\r\nConnection: Upgrade\r\n\r\nhello")
			b := make([]byte, 3)
			_, err := io.ReadFull(r, b)
			return fmt.Sprintf("%v %q %s", strings.Contains(head, "Upgrade: odd/1"), b, name(err))
		}, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\nConnection: Upgrade\r\nUpgrade: odd/1\r\n\r\n")
			head := readHead(r)
			b := make([]byte, 5)
			_, err := io.ReadFull(r, b)
			c.Write([]byte{0, 1, 2})
			return fmt.Sprintf("%q %q %s", firstLine(head), b, name(err))
		})
	}},
	{"http-half-close", func(s *stage) string {
		return s.halfClose("POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
	}},
	{"http-half-close-of-kept-connection", func(s *stage) string {
		return s.halfClose("GET / HTTP/1.1\r\nHost: target\r\n\r\n")
	}},
	{"http-half-close-in-a-body", func(s *stage) string {
		return s.halfClose("POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 200\r\n\r\nhi")
	}},
	{"http-half-close-of-upgrade", func(s *stage) string {
		return s.halfClose("GET / HTTP/1.1\r\nHost: target\r\nConnection: Upgrade\r\nUpgrade: odd/1\r\n\r\n")
	}},
	{"http-client-stops-waiting", func(s *stage) string {
		// Its library closes the connection when the time is over. Servers look for that.
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			readHead(r)
			_, err := r.ReadByte()
			return "the server sees " + name(err)
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
			c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			c.Read(make([]byte, 1))
			c.Close()
			return ""
		})
	}},
	{"http-client-resets", func(s *stage) string {
		return s.talk(portText, func(c *net.TCPConn) string {
			r := bufio.NewReader(c)
			readHead(r)
			_, err := r.ReadByte()
			return "the server sees " + name(err)
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: target\r\n\r\n")
			c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			c.Read(make([]byte, 1))
			reset(c)
			return ""
		})
	}},
	{"http-long-head", func(s *stage) string {
		return fold(s.exchange("GET / HTTP/1.1\r\nHost: target\r\nX-Long: "+strings.Repeat("l", 20000)+"\r\n\r\n", okAnswer))
	}},
	{"http-other-method", func(s *stage) string {
		return s.exchange("BREW /pot HTTP/1.1\r\nHost: target\r\nContent-Length: 1\r\n\r\nx", okAnswer)
	}},
	// What is refused at the door, because two readers could read it in two ways.
	{"http-bare-newlines", func(s *stage) string { return s.refusal("GET / HTTP/1.1\nHost: target\n\n") }},
	{"http-two-lengths", func(s *stage) string {
		return s.refusal("POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc")
	}},
	{"http-length-and-chunked", func(s *stage) string {
		return s.refusal("POST / HTTP/1.1\r\nHost: target\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
	}},
	{"http-folded-header", func(s *stage) string {
		return s.refusal("GET / HTTP/1.1\r\nHost: target\r\nX-Folded: a\r\n b\r\n\r\n")
	}},
	{"http-space-before-colon", func(s *stage) string {
		return s.refusal("GET / HTTP/1.1\r\nHost: target\r\nX-Space : a\r\n\r\n")
	}},
	{"http-no-host", func(s *stage) string { return s.refusal("GET / HTTP/1.1\r\nX: y\r\n\r\n") }},
	{"http-huge-head", func(s *stage) string {
		return fold(s.refusal("GET / HTTP/1.1\r\nHost: target\r\nX-Huge: " + strings.Repeat("h", 300000) + "\r\n\r\n"))
	}},
	{"http-on-undeclared-protocol", func(s *stage) string {
		// HTTP-like bytes, then something else: an application's own protocol.
		return s.talk(portBytes, func(c *net.TCPConn) string {
			b := make([]byte, 14)
			_, err := io.ReadFull(c, b)
			io.WriteString(c, "FINE")
			return fmt.Sprintf("%q %s", b, name(err))
		}, func(c *net.TCPConn) string {
			io.WriteString(c, "GETKEY alpha\x00\x01")
			b := make([]byte, 4)
			_, err := io.ReadFull(c, b)
			return fmt.Sprintf("%q %s", b, name(err))
		})
	}},
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// exchange sends a request and shows the bytes that the server received.
func (s *stage) exchange(request, answer string) string {
	return s.talk(portText, func(c *net.TCPConn) string {
		got := make([]byte, len(request))
		n, err := io.ReadFull(c, got)
		io.WriteString(c, answer)
		if string(got) == request {
			return "as sent"
		}
		return fmt.Sprintf("%q %s", got[:n], name(err))
	}, func(c *net.TCPConn) string {
		io.WriteString(c, request)
		got := make([]byte, len(answer))
		n, err := io.ReadFull(c, got)
		if string(got) != answer {
			return fmt.Sprintf("answered %q %s", got[:n], name(err))
		}
		return ""
	})
}

// halfClose sends a request and half-closes; the server sees that, and answers.
func (s *stage) halfClose(request string) string {
	return s.talk(portText, func(c *net.TCPConn) string {
		b, end := readAll(c)
		io.WriteString(c, okAnswer)
		if string(b) == request {
			return "the server sees it as sent and " + end
		}
		return fmt.Sprintf("the server sees %q and %s", b, end)
	}, func(c *net.TCPConn) string {
		io.WriteString(c, request)
		c.CloseWrite()
		b, end := readAll(c)
		return fmt.Sprintf("the client has %q and %s", b, end)
	})
}

// answer sends a request and shows the bytes that the client received.
func (s *stage) answer(request, answer string) string {
	return s.talk(portText, func(c *net.TCPConn) string {
		io.ReadFull(c, make([]byte, len(request)))
		io.WriteString(c, answer)
		return ""
	}, func(c *net.TCPConn) string {
		io.WriteString(c, request)
		b := make([]byte, len(answer))
		n, err := io.ReadFull(c, b)
		if string(b) == answer {
			return "as sent"
		}
		return fmt.Sprintf("%q, %s", b[:n], name(err))
	})
}

// refusal sends a request that may be refused on the way; the server would answer
// everything with 200.
func (s *stage) refusal(request string) string {
	return s.talkOptional(portText, func(c *net.TCPConn) string {
		got := make([]byte, len(request))
		n, _ := io.ReadFull(c, got)
		io.WriteString(c, okAnswer)
		c.CloseWrite()
		io.Copy(io.Discard, c)
		if n == 0 {
			return "the server sees nothing"
		}
		if string(got) == request {
			return "the server sees it as sent"
		}
		return fmt.Sprintf("the server sees %q", got[:n])
	}, func(c *net.TCPConn) string {
		io.WriteString(c, request)
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		f := strings.Fields(firstLine(string(b)))
		if len(f) < 2 {
			return fmt.Sprintf("answered %q", b)
		}
		return "the client has " + f[1]
	})
}

// talkOptional is talk for connections that may never reach the server.
func (s *stage) talkOptional(port int, server, client func(c *net.TCPConn) string) string {
	said := make(chan string, 1)
	handle := func(c *net.TCPConn) {
		c.SetDeadline(time.Now().Add(patience))
		said <- server(c)
	}
	s.handler[port].Store(&handle)
	defer s.handler[port].Store(nil)
	c, err := s.client.Dial(s.service(port))
	if err != nil {
		return "connect: " + name(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	mine := client(c)
	theirs := "the server sees nothing"
	select {
	case theirs = <-said:
	case <-time.After(2 * time.Second):
	}
	return join(theirs, mine)
}

// readHead reads lines to an empty one.
func readHead(r *bufio.Reader) string {
	var head strings.Builder
	for {
		line, err := r.ReadString('\n')
		head.WriteString(line)
		if err != nil || line == "\r\n" {
			return head.String()
		}
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\r\n")
	return line
}

// fold keeps long results readable.
func fold(s string) string {
	if len(s) > 200 {
		return s[:100] + "…"
	}
	return s
}
