package http1

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// script is an application whose every byte the test reads and says.
type script struct {
	t    testing.TB
	addr string
	conn chan *net.TCPConn
}

func newScript(t testing.TB) *script {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &script{t, l.Addr().String(), make(chan *net.TCPConn, 100)}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conn <- c.(*net.TCPConn)
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
		for len(s.conn) > 0 {
			(<-s.conn).Close()
		}
	})
	return s
}

// accept returns the next connection to the application.
func (s *script) accept() *net.TCPConn {
	s.t.Helper()
	select {
	case c := <-s.conn:
		s.t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	case <-time.After(10 * time.Second):
		s.t.Fatal("the application was not connected to")
		return nil
	}
}

// expect reads exactly text from c.
func expect(t testing.TB, c io.Reader, text string) {
	t.Helper()
	got := make([]byte, len(text))
	n, err := io.ReadFull(c, got)
	if string(got[:n]) != text {
		t.Fatalf("got %q (%v)\nwant %q", got[:n], err, text)
	}
}

func say(t testing.TB, c io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// expectEnd wants a clean end.
func expectEnd(t testing.TB, c io.Reader) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("got %d bytes and %v, want the end", n, err)
	}
}

// expectReset wants a reset, after whatever was said before it.
func expectReset(t testing.TB, c io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("got %q and %v, want a reset", rest, err)
	}
}

// expectGone wants the connection to end one way or the other.
func expectGone(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("got %v, want the end", err)
	}
}

// expectAnswer wants an answer of our own and the end.
func expectAnswer(t testing.TB, c io.Reader, status string, reason string) {
	t.Helper()
	text, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(text), "HTTP/1.1 "+status+" ") || !strings.Contains(string(text), "\r\nAssay-Error: "+reason+"\r\n") ||
		!strings.Contains(string(text), "\r\nConnection: close\r\n") {
		t.Fatalf("got %q and %v, want %s %s", text, err, status, reason)
	}
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

const (
	getA  = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
	getB  = "GET /b HTTP/1.1\r\nHost: a\r\n\r\n"
	okay  = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	okayB = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nokB"
)

// swap carries one exchange on connections that exist.
func swap(t testing.TB, client, app net.Conn, request, response string) {
	t.Helper()
	say(t, client, request)
	expect(t, app, request)
	say(t, app, response)
	expect(t, client, response)
}
