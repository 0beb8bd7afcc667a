package http1

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// message is a case of testdata/messages, whose README says what is in it.
type message struct {
	file, group, name string
	want, why, to     string
	parts             [][]byte // the messages
}

func (m *message) bytes() []byte { return bytes.Join(m.parts, nil) }

// refused returns status and reason of a refusal.
func (m *message) refused() (status, reason string) {
	if f := strings.Fields(m.want); len(f) == 3 && f[0] == "refused" {
		return f[1], f[2]
	}
	return "", ""
}

// messages reads the cases of a file.
func messages(t testing.TB, file string) (list []*message) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "messages", file+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	var m *message
	group := ""
	names := map[string]bool{}
	for i, line := range strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n") {
		switch {
		case strings.HasPrefix(line, "# "):
			group = line[2:]
		case strings.HasPrefix(line, "== "):
			f := strings.Split(line[3:], " | ")
			if len(f) < 3 || len(f) > 4 || names[f[0]] {
				t.Fatalf("%s line %d: a case has a name of its own, what must happen, and why", file, i+1)
			}
			names[f[0]] = true
			m = &message{file: file, group: group, name: f[0], want: f[1], why: f[2], parts: [][]byte{nil}}
			if len(f) == 4 {
				m.to = f[3]
			}
			list = append(list, m)
		case line == "--":
			m.parts = append(m.parts, nil)
		default:
			last := &m.parts[len(m.parts)-1]
			b, err := unescape(line)
			if err != nil {
				t.Fatalf("%s line %d: %v", file, i+1, err)
			}
			*last = append(*last, b...)
		}
	}
	return list
}

// unescape turns a line into bytes.
func unescape(s string) (b []byte, err error) {
	end := "\r\n"
	if n := len(s) - len(strings.TrimRight(s, `\`)); n%2 == 1 {
		s, end = s[:len(s)-1], ""
	}
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		if i++; i == len(s) {
			return nil, errors.New("a backslash at the end")
		}
		switch s[i] {
		case 'r', 'n', 't', '0', '\\':
			b = append(b, map[byte]byte{'r': '\r', 'n': '\n', 't': '\t', '0': 0, '\\': '\\'}[s[i]])
		case 'x':
			v, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return nil, err
			}
			b = append(b, byte(v))
			i += 2
		case '{':
			close := strings.IndexByte(s[i:], '}') + i
			star := strings.LastIndexByte(s[:close], '*')
			n, err := strconv.Atoi(s[star+1 : close])
			if err != nil {
				return nil, err
			}
			piece, err := unescape(s[i+1:star] + `\`)
			if err != nil {
				return nil, err
			}
			b = append(b, bytes.Repeat(piece, n)...)
			i = close
		default:
			return nil, fmt.Errorf("unknown escape %q", s[i])
		}
	}
	return append(b, end...), nil
}

// read is a reader of requests made of the parser alone: the sizes of the messages at
// the start of b, and why it stopped, nil when b ended. rest is the size of what
// belongs to a message that is not complete.
func read(b []byte, piece int) (sizes []int, rest int, refusal *Refusal) {
	for len(b) > 0 {
		if bytes.HasPrefix(b, []byte("\r\n")) {
			b = b[2:]
			continue
		}
		var r Request
		done := false
		for n := 0; !done && n < len(b); {
			n = min(n+piece, len(b))
			var err *Refusal
			if done, err = r.Parse(bytes.Clone(b[:n]), &limits); err != nil {
				return sizes, 0, err
			}
		}
		if !done {
			return sizes, 0, nil // nothing of an incomplete head is carried
		}
		body := r.Body(&limits)
		n, err := advance(&body, string(b[r.Size:]), piece)
		if err != nil {
			return sizes, r.Size + n, err
		}
		if !body.Done() {
			return sizes, r.Size + n, nil
		}
		sizes = append(sizes, r.Size+n)
		b = b[r.Size+n:]
		if !r.Persistent() {
			return sizes, 0, nil
		}
	}
	return sizes, 0, nil
}

// TestMessagesRead runs the requests through the parser, in pieces of several sizes.
func TestMessagesRead(t *testing.T) {
	for _, file := range []string{"rfc-requests", "smuggling-requests"} {
		for _, m := range messages(t, file) {
			t.Run(file+"/"+m.name, func(t *testing.T) {
				text := m.bytes()
				for _, piece := range []int{1, 3, 1 << 20} {
					if piece < 16 && len(text) > 4096 {
						continue
					}
					sizes, rest, refusal := read(text, piece)
					complete := m.parts
					switch status, reason := m.refused(); {
					case status != "":
						complete = m.parts[:len(m.parts)-1]
						if refusal == nil || refusal.Reason != reason || fmt.Sprint(refusal.Status) != status {
							t.Fatalf("pieces of %d: %v, want %s %s", piece, refusal, status, reason)
						}
					case refusal != nil:
						t.Fatalf("pieces of %d: %v", piece, refusal)
					case m.want == "incomplete":
						complete = m.parts[:len(m.parts)-1]
						if last := len(m.parts[len(m.parts)-1]); rest != last && rest != 0 {
							t.Fatalf("pieces of %d: %d of %d bytes of what is incomplete", piece, rest, last)
						}
					case m.want == "ended", m.want == "hop":
						complete = m.parts[:1]
					case m.want != "carried":
						t.Fatalf("unknown wish %q", m.want)
					}
					if len(sizes) != len(complete) {
						t.Fatalf("pieces of %d: %d messages, want %d", piece, len(sizes), len(complete))
					}
					for i, size := range sizes {
						if want := len(trimFirst(complete[i], i)); size != want {
							t.Fatalf("pieces of %d: message %d has %d bytes, want %d", piece, i, size, want)
						}
					}
				}
			})
		}
	}
}

// trimFirst drops the empty line before the first message.
func trimFirst(b []byte, i int) []byte {
	if i == 0 {
		return bytes.TrimPrefix(b, []byte("\r\n"))
	}
	return b
}

// eachWay runs a test through both forms of the engine, without TLS, and with bytes that
// come at once or in pieces.
func eachWay(t *testing.T, f func(t *testing.T, mode string, send func(net.Conn, []byte))) {
	for _, mode := range []string{unencrypted, plain} {
		f(t, mode, func(c net.Conn, b []byte) { c.Write(b) })
		f(t, mode, func(c net.Conn, b []byte) {
			if len(b) > 4096 {
				pieces(1, c, b)
				return
			}
			for i := range b {
				c.Write(b[i : i+1])
			}
		})
	}
}

// TestMessagesCarried runs the requests through the engine to an application that
// reads bytes: it gets what must be carried, and never a whole message that must be refused.
func TestMessagesCarried(t *testing.T) {
	for _, file := range []string{"rfc-requests", "smuggling-requests"} {
		for _, m := range messages(t, file) {
			t.Run(file+"/"+m.name, func(t *testing.T) { eachWay(t, m.carry) })
		}
	}
}

func (m *message) carry(t *testing.T, mode string, send func(net.Conn, []byte)) {
	app := newScript(t)
	w := newWorld(t, mode, app.addr)
	c := w.dial()
	go send(c, m.bytes())
	status, reason := m.refused()
	var a *net.TCPConn
	last := len(m.parts) - 1
	for i, part := range m.parts {
		part = trimFirst(part, i)
		switch {
		case i == last && status != "":
			expectAnswer(t, c, status, reason)
			m.notWhole(t, w, app, a, part)
			return
		case i == last && m.want == "incomplete":
			if !bytes.Contains(part, []byte("\r\n\r\n")) {
				c.CloseWrite()
				expectEnd(t, c)
				if w.dialled() > 0 {
					t.Fatal("the application was connected to")
				}
				return
			}
			if a == nil {
				a = app.accept()
			}
			expect(t, a, string(part))
			c.CloseWrite()
			expectEnd(t, a)
			return
		case i > 0 && m.want == "ended":
			expectEnd(t, c)
			expectEnd(t, a)
			return
		}
		if a == nil {
			a = app.accept()
		}
		if m.want == "hop" {
			carryHop(t, w, c, a, string(part))
			return
		}
		expect(t, a, string(part))
		answer := "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
		if bytes.HasPrefix(part, []byte("CONNECT ")) {
			answer = strings.Replace(answer, "200 OK", "405 No", 1)
		}
		say(t, a, answer)
		expect(t, c, answer)
	}
	// Both ends agree on where the last message ended.
	r := new(Request)
	if ok, _ := r.Parse(trimFirst(m.parts[last], last), &limits); !ok || !r.Persistent() {
		expectEnd(t, c)
		expectEnd(t, a)
		return
	}
	swap(t, c, a, getB, okayB)
}

// carryHop wants that a request arrives without what it says of the client's connection,
// which ends with an answer that says so, and that the application's goes on.
func carryHop(t *testing.T, w *world, c, a net.Conn, request string) {
	t.Helper()
	expect(t, a, strings.Replace(request, "Connection: close\r\n", "", 1))
	say(t, a, "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\nok")
	expect(t, c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	expectEnd(t, c)
	swap(t, w.dial(), a, getB, okayB)
}

// notWhole wants that the application got less than a message that was refused, and that
// its connection did not end as if that were all.
func (m *message) notWhole(t *testing.T, w *world, app *script, a *net.TCPConn, part []byte) {
	t.Helper()
	if a == nil {
		if w.dialled() == 0 {
			return
		}
		select {
		case a = <-app.conn:
			defer a.Close()
			a.SetDeadline(time.Now().Add(10 * time.Second))
		case <-time.After(20 * time.Millisecond):
			return // given up before it was connected to
		}
	} else {
		a.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // it may be kept
	}
	got, err := io.ReadAll(a)
	if len(got) >= len(part) || !bytes.HasPrefix(part, got) {
		t.Fatalf("the application got %q", got)
	}
	if len(got) > 0 && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("after a part of a message: %v, want a reset", err)
	}
}

// TestMessagesAnswered runs the responses through the engine.
func TestMessagesAnswered(t *testing.T) {
	for _, file := range []string{"rfc-responses", "smuggling-responses"} {
		for _, m := range messages(t, file) {
			t.Run(file+"/"+m.name, func(t *testing.T) { eachWay(t, m.answer) })
		}
	}
}

func (m *message) answer(t *testing.T, mode string, send func(net.Conn, []byte)) {
	app := newScript(t)
	w := newWorld(t, mode, app.addr)
	c := w.dial()
	request := map[string]string{"": getA, "HEAD": "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT": connect, "upgrade": upgrade, "old": "GET / HTTP/1.0\r\nConnection: close\r\n\r\n"}[m.to]
	say(t, c, request)
	a := app.accept()
	expect(t, a, request)
	sent := make(chan bool)
	go func() {
		send(a, m.bytes())
		close(sent)
	}()
	first := string(m.parts[0])
	wish, reason, _ := strings.Cut(m.want, " ")
	switch wish {
	case "carried":
		expect(t, c, first)
		swap(t, c, a, getB, okayB)
	case "closed":
		<-sent
		a.CloseWrite()
		expect(t, c, first)
		expectEnd(t, c)
	case "tunnel":
		expect(t, c, first)
		swap(t, c, a, "any\x00thing", "back")
	case "surplus":
		expect(t, c, first)
		expectGone(t, a)
		// The next request goes elsewhere, and has an answer of its own.
		say(t, c, getB)
		b := app.accept()
		expect(t, b, getB)
		say(t, b, okayB)
		expect(t, c, okayB)
	case "refused":
		if reason == "interim-limit" {
			b, err := io.ReadAll(c)
			i := strings.LastIndex(string(b), "HTTP/1.1 ")
			if err != nil || !strings.Contains(string(b[max(i, 0):]), "Assay-Error: interim-limit\r\n") || !bytes.HasPrefix(m.parts[0], b[:i]) {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
			return
		}
		expectInterim(t, c, reason)
		expectGone(t, a)
	case "cut":
		// At once, nothing may have been carried yet; in pieces, a part of it.
		b, err := io.ReadAll(c)
		if bytes.HasPrefix(b, []byte("HTTP/1.1 502 ")) {
			if err != nil || !strings.Contains(string(b), "Assay-Error: "+reason+"\r\n") {
				t.Fatalf("%q %v", b, err)
			}
		} else if !errors.Is(err, syscall.ECONNRESET) || len(b) >= len(first) || !strings.HasPrefix(first, string(b)) {
			t.Fatalf("%q %v", b, err)
		}
		expectGone(t, a)
	default:
		t.Fatalf("unknown wish %q", m.want)
	}
	if reason == "" {
		return
	}
	if x := w.servers.wait(t, 1)[0]; x.Failure != reason {
		t.Errorf("failure %q, want %q", x.Failure, reason)
	}
}

// expectInterim is expectAnswer behind interim responses.
func expectInterim(t *testing.T, c io.Reader, reason string) {
	t.Helper()
	b, err := io.ReadAll(c)
	text := string(b)
	for strings.HasPrefix(text, "HTTP/1.1 1") {
		_, text, _ = strings.Cut(text, "\r\n\r\n")
	}
	if err != nil || !strings.HasPrefix(text, "HTTP/1.1 502 ") || !strings.Contains(text, "\r\nAssay-Error: "+reason+"\r\n") {
		t.Fatalf("%q %v, want 502 %s", b, err, reason)
	}
}
