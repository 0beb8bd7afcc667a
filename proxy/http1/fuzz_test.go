package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/netip"
	"testing"
)

// FuzzRequestHead checks that pieces do not matter, and holds the parser against
// net/http: whatever we carry, it reads too, and frames in the same way.
func FuzzRequestHead(f *testing.F) {
	for _, c := range corpus {
		if len(c.head) < 4096 {
			f.Add([]byte(c.head+"5\r\nhello\r\n0\r\n\r\nGET"), 7)
		}
	}
	f.Add(append(bytes.Clone(browser), browser...), 100)
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n0\r\nDigest: a\r\n\r\nGET"), 1)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		var r Request
		ok, err := r.Parse(text, &limits)
		if piece > 0 {
			again, errAgain := parseRequest(string(text), piece)
			if err != errAgain || ok && again.Size != r.Size {
				t.Fatalf("pieces matter: %v, then %v", err, errAgain)
			}
		}
		if !ok || err != nil {
			return
		}
		body := r.Body(&limits)
		n, err := advance(&body, string(text[r.Size:]), 1<<20)
		sameAsReference(t, text, &r, n, err == nil && body.Done())
	})
}

// sameAsReference compares what we carry with what net/http makes of it. n bytes
// are the body as it was framed, complete or not.
func sameAsReference(t *testing.T, text []byte, r *Request, n int, complete bool) {
	t.Helper()
	left := bytes.NewReader(text)
	in := bufio.NewReaderSize(left, 128<<10)
	ref, err := http.ReadRequest(in)
	if err != nil {
		t.Fatalf("carried, but net/http refuses: %v\n%q", err, text)
	}
	if ref.Method != string(r.Method) || ref.RequestURI != string(r.Target) || ref.Host != string(r.Authority) && !sameFold([]byte(ref.Host), r.Authority) {
		t.Fatalf("net/http sees %s %s %s, we see %s %s %s", ref.Method, ref.RequestURI, ref.Host, r.Method, r.Target, r.Authority)
	}
	if chunked := len(ref.TransferEncoding) == 1; chunked != r.Chunked || !chunked && ref.ContentLength != r.Length {
		t.Fatalf("net/http frames as %v and %d, we as %v and %d", ref.TransferEncoding, ref.ContentLength, r.Chunked, r.Length)
	}
	if ref.Close == r.Persistent() && !(r.Close && r.KeepAlive) && r.Minor == 1 {
		t.Fatalf("net/http close %v, we persistent %v\n%q", ref.Close, r.Persistent(), text)
	}
	_, err = io.Copy(io.Discard, ref.Body)
	if !complete {
		return
	}
	if err != nil {
		t.Fatalf("body carried, but net/http refuses: %v\n%q", err, text)
	}
	if taken := len(text) - left.Len() - in.Buffered(); taken != r.Size+n {
		t.Fatalf("net/http takes %d bytes, we %d\n%q", taken, r.Size+n, text)
	}
}

// FuzzResponseHead does the same for responses.
func FuzzResponseHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP"), 3, false)
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\nHTTP"), 3, true)
	f.Add([]byte("HTTP/1.0 304 \r\nConnection: keep-alive\r\n\r\n"), 1, false)
	f.Add([]byte("HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n"), 1, false)
	f.Fuzz(func(t *testing.T, text []byte, piece int, isHead bool) {
		var r Response
		ok, err := r.Parse(text, &limits)
		if piece > 0 {
			again, errAgain := parseResponse(string(text), piece)
			if err != errAgain || ok && again.Size != r.Size {
				t.Fatalf("pieces matter: %v, then %v", err, errAgain)
			}
		}
		if !ok || err != nil || r.Status == 101 {
			return
		}
		method := "GET"
		if isHead {
			method = "HEAD"
		}
		left := bytes.NewReader(text)
		in := bufio.NewReaderSize(left, 128<<10)
		ref, refErr := http.ReadResponse(in, &http.Request{Method: method})
		if refErr != nil {
			t.Fatalf("carried, but net/http refuses: %v\n%q", refErr, text)
		}
		if ref.StatusCode != r.Status {
			t.Fatalf("status %d, net/http %d", r.Status, ref.StatusCode)
		}
		body := r.Body(isHead, false, &limits)
		n, err := advance(&body, string(text[r.Size:]), 1<<20)
		_, refErr = io.Copy(io.Discard, ref.Body)
		if err != nil || !body.Done() {
			return
		}
		if refErr != nil {
			t.Fatalf("body carried, but net/http refuses: %v\n%q", refErr, text)
		}
		if taken := len(text) - left.Len() - in.Buffered(); taken != r.Size+n {
			t.Fatalf("net/http takes %d bytes, we %d\n%q", taken, r.Size+n, text)
		}
	})
}

// FuzzChunked checks that pieces do not matter, and that net/http takes the same
// bytes of a body that we take whole.
func FuzzChunked(f *testing.F) {
	for _, s := range []string{"0\r\n\r\n", "5;a=\"b\"\r\nhello\r\n0\r\nDigest: x\r\n\r\nnext", "a\r\n0123456789\r\n1 ;x\r\nx\r\n00\r\n\r\n", "5\nhello", "ffffffffffffffffff"} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		whole := Body{Framing: Chunks, lim: &limits}
		n, err := whole.Advance(text)
		if piece > 0 {
			parts := Body{Framing: Chunks, lim: &limits}
			nParts, errParts := advance(&parts, string(text), piece)
			if err != errParts || n != nParts || whole.Done() != parts.Done() {
				t.Fatalf("pieces matter: %d %v, then %d %v", n, err, nParts, errParts)
			}
		}
		if err != nil || !whole.Done() {
			return
		}
		const head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
		var r Request
		message := append([]byte(head), text...)
		if ok, err := r.Parse(message, &limits); !ok || err != nil {
			t.Fatal(ok, err)
		}
		sameAsReference(t, message, &r, n, true)
	})
}

// FuzzIPv6 holds our reader of IPv6 literals against net/netip.
func FuzzIPv6(f *testing.F) {
	for _, s := range []string{"::", "::1", "1::", "fd00::1:2", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "::ffff:1.2.3.4", "1:2:3:4:5:6:1.2.3.4", "1::2::3", "1:2:3:4:5:6:7", ":1", "1:", "::01.2.3.4", "12345::", "1:2:3:4:5:6:7:8::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := netip.ParseAddr(s)
		if want := err == nil && a.Is6() && a.Zone() == ""; validIPv6([]byte(s)) != want {
			t.Fatalf("%q: %v, net/netip says %v (%v)", s, !want, want, err)
		}
	})
}
