package http1

import (
	"strings"
	"testing"
)

func parseResponse(text string, piece int) (*Response, *Refusal) {
	var r Response
	for n := min(piece, len(text)); ; n = min(n+piece, len(text)) {
		done, err := r.Parse([]byte(text[:n]), &limits)
		if err != nil {
			return nil, err
		}
		if done || n == len(text) {
			return &r, nil
		}
	}
}

func TestResponseCorpus(t *testing.T) {
	for text, want := range map[string]*Refusal{
		"HTTP/1.1 200 OK\r\n\r\n":                                           nil,
		"HTTP/1.0 404 \r\n\r\n":                                             nil,
		"HTTP/1.1 200\r\n\r\n":                                              nil,
		"HTTP/1.1 999 \xe9t\xe9\r\n\r\n":                                    nil,
		"HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n":                       nil,
		"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n":                       nil,
		"HTTP/1.1 20 OK\r\n\r\n":                                            ErrStatusLine,
		"HTTP/1.1 2000 OK\r\n\r\n":                                          ErrStatusLine,
		"HTTP/1.1 099 OK\r\n\r\n":                                           ErrStatusLine,
		"HTTP/1.1  200 OK\r\n\r\n":                                          ErrStatusLine,
		"HTTP/1.1 200 O\x00K\r\n\r\n":                                       ErrStatusLine,
		"HTTP/1.1 200 O\rK\r\n\r\n":                                         ErrStatusLine,
		"ICY 200 OK\r\n\r\n":                                                ErrStatusLine,
		"HTTP/2.0 200 OK\r\n\r\n":                                           ErrVersion,
		"HTTP/1.1 200 OK\n\r\n":                                             ErrBareLF,
		"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n":                             ErrFold,
		"HTTP/1.1 200 OK\r\nX : a\r\n\r\n":                                  ErrSpaceColon,
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n": ErrLengthTwice,
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n": ErrLengthCoding,
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n":                     ErrCoding,
		"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n":                      ErrCodingOld,
		"HTTP/1.1 204 X\r\nContent-Length: 5\r\n\r\n":                                ErrNoBody,
		"HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n":                       ErrNoBody,
		"HTTP/1.1 101 X\r\nContent-Length: 5\r\n\r\n":                                ErrNoBody,
		"HTTP/1.1 100 X\r\nTransfer-Encoding: chunked\r\n\r\n":                       ErrNoBody,
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 65<<10) + "\r\n\r\n":          ErrHeadLong,
	} {
		for _, piece := range []int{1, 1 << 20} {
			if piece == 1 && len(text) > 4096 {
				continue
			}
			r, err := parseResponse(text, piece)
			if err != want {
				t.Errorf("%.60q in pieces of %d: got %v, want %v", text, piece, err, want)
			} else if err == nil && r.Size != len(text) {
				t.Errorf("%.60q: size %d, want %d", text, r.Size, len(text))
			}
		}
	}
}

func TestResponseFraming(t *testing.T) {
	const ok, length, chunked = "HTTP/1.1 200 OK\r\n", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"
	for _, c := range []struct {
		text          string
		head, connect bool
		want          Framing
	}{
		{ok + length, false, false, Length},
		{ok + "Content-Length: 0\r\n", false, false, NoBody},
		{ok + chunked, false, false, Chunks},
		{ok, false, false, UntilClose},
		{ok + length, true, false, NoBody},
		{ok + chunked, true, false, NoBody},
		{ok, true, false, NoBody},
		{ok + length, false, true, Tunnel},
		{"HTTP/1.1 407 No\r\n" + length, false, true, Length},
		{"HTTP/1.1 101 X\r\n", false, false, Tunnel},
		{"HTTP/1.1 100 X\r\n", false, false, NoBody},
		{"HTTP/1.1 204 X\r\n", false, false, NoBody},
		{"HTTP/1.1 304 X\r\n" + length, false, false, NoBody},
		{"HTTP/1.1 304 X\r\n" + chunked, false, false, NoBody},
	} {
		r, err := parseResponse(c.text+"\r\n", 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		body := r.Body(c.head, c.connect, &limits)
		if body.Framing != c.want {
			t.Errorf("%q head %v connect %v: %s, want %s", c.text, c.head, c.connect, body.Framing, c.want)
		}
	}
}

func TestResponsePersistence(t *testing.T) {
	const new, old = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
	for _, c := range []struct {
		req, resp string
		want      bool
	}{
		{new, "HTTP/1.1 200 OK\r\n\r\n", true},
		{new, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", false},
		{new, "HTTP/1.0 200 OK\r\n\r\n", false},
		{new, "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n", true},
		{old, "HTTP/1.1 200 OK\r\n\r\n", false},
		{old, "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", true},
		{"GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n", false},
	} {
		q, _ := parseRequest(c.req, 1<<20)
		r, _ := parseResponse(c.resp, 1<<20)
		if got := r.Persistent(q); got != c.want {
			t.Errorf("%q %q: %v, want %v", c.req, c.resp, got, c.want)
		}
	}
}

func BenchmarkResponse(b *testing.B) {
	text := []byte("HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Mon, 05 Jan 2026 10:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 50\r\nConnection: keep-alive\r\n\r\n")
	b.ReportAllocs()
	var r Response
	for b.Loop() {
		r.Reset()
		if ok, err := r.Parse(text, &limits); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
