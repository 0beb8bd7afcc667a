package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// FuzzCarriage: what a peer's proxy may send for a list of fields is read in one way, or
// refused; what is read is written again as it came.
func FuzzCarriage(f *testing.F) {
	var b buffer
	b.appendFields(blockHead, []Field{{Name: ":method", Value: "GET"}, {Name: "cookie", Value: "a=b", Sensitive: true}, {Name: "x", Value: ""}})
	f.Add(b.b[blockHeader:])
	f.Add([]byte{0x80, 0x00})
	f.Add([]byte{0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, p []byte) {
		var fields []Field
		for list := p; len(list) > 0; {
			name, value, sensitive, rest, ok := cutField(list)
			if !ok {
				return
			}
			fields = append(fields, Field{Name: string(name), Value: string(value), Sensitive: sensitive})
			list = rest
		}
		var b buffer
		b.appendFields(blockHead, fields)
		if !bytes.Equal(b.b[blockHeader:], p) {
			t.Errorf("%x was written as %x", p, b.b[blockHeader:])
		}
	})
}

// FuzzCheck: a message that is taken has none of what the rules forbid, whatever the path.
func FuzzCheck(f *testing.F) {
	f.Add("GET", "http", "/", "a.test", "x", "1")
	f.Add("CONNECT", "", "", "a.test:1", "host", "b")
	f.Add("GET", "http", "/a b", "a.test", "content-length", "01")
	f.Fuzz(func(t *testing.T, method, scheme, path, authority, name, value string) {
		var head Head
		fields := []Field{{Name: ":method", Value: method}, {Name: ":scheme", Value: scheme}, {Name: ":path", Value: path}, {Name: ":authority", Value: authority}, {Name: name, Value: value}}
		if _, why := check(request, fields, &head, nil); why != nil {
			return
		}
		for _, x := range fields {
			if bytes.ContainsAny([]byte(x.Name+x.Value), "\r\n\x00") {
				t.Errorf("taken: %q", x)
			}
		}
		if bytes.ContainsAny([]byte(method+path+authority+scheme), " \t") || bytes.ContainsAny([]byte(path), "#") || name == "connection" || name == "transfer-encoding" {
			t.Errorf("taken: %q", fields)
		}
		if name == "host" && value != "" && !sameAuthority(scheme, authority, value) {
			t.Errorf("taken: %q", fields)
		}
	})
}

// FuzzConnection plays a client whose frames are the input: whatever it says, the proxy
// answers or ends the connection, the application sees only whole requests, and another
// client of the same proxy is served.
func FuzzConnection(f *testing.F) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, x := range []Field{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: "a.test"}} {
		enc.WriteField(x)
	}
	head := appendHeader(nil, block.Len(), frameHeaders, flagEndHeaders, 1)
	head = append(head, block.Bytes()...)
	seed := appendSettings(nil)
	seed = append(seed, head...)
	seed = append(appendHeader(seed, 3, frameData, flagEndStream, 1), "abc"...)
	f.Add(seed)
	f.Add(appendReset(append(appendSettings(nil), head...), 1, Cancel))
	f.Add(appendWindow(append(appendSettings(nil, setting{settingWindow, 0}), head...), 1, 7))
	f.Add(append(appendGoaway(appendSettings(nil), 0, NoError, ""), head...))
	app := serveHTTP(f, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "answer")
	})
	w := newWorld(f, app, quiet)
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write(append([]byte(preface), p...)); err != nil {
			return
		}
		// A PING: it is answered, unless a frame is unfinished or the connection has ended.
		c.Write(appendPing(nil, 0, []byte("the last")))
		c.(*net.TCPConn).CloseWrite()
		raw, err := io.ReadAll(c)
		if errors.Is(err, net.ErrClosed) || isTimeout(err) {
			t.Fatalf("the proxy neither answers nor ends: %v", err)
		}
		for len(raw) >= frameHeader {
			h := parseHeader(raw)
			if h.length > maxFrame {
				t.Fatalf("a frame of %d bytes", h.length)
			}
			if len(raw) < frameHeader+h.length {
				break
			}
			if h.kind == frameGoaway && binary.BigEndian.Uint32(raw[frameHeader:]) > maxWindow {
				t.Fatal("GOAWAY with a stream that cannot be")
			}
			raw = raw[frameHeader+h.length:]
		}
		k := &caller{buf: make([]byte, 64<<10), id: 1}
		if k.c, err = net.Dial("tcp", w.addr); err != nil {
			t.Fatal(err)
		}
		defer k.c.Close()
		k.c.SetDeadline(time.Now().Add(patience))
		k.enc = hpack.NewEncoder(&k.block)
		k.out = appendSettings(append(k.out, preface...))
		if _, err := k.run(1, 1); err != nil {
			t.Fatalf("another client: %v", err)
		}
	})
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
