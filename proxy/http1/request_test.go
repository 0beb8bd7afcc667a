package http1

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

var limits = Limits{}.WithDefaults()

// parseRequest feeds head in pieces of the given size, each time in a buffer that
// moved, as a connection's buffer does when it grows.
func parseRequest(head string, piece int) (*Request, *Refusal) {
	var r Request
	for n := min(piece, len(head)); ; n = min(n+piece, len(head)) {
		done, err := r.Parse([]byte(head[:n]), &limits)
		if err != nil {
			return nil, err
		}
		if done {
			return &r, nil
		}
		if n == len(head) {
			return &r, nil
		}
	}
}

// corpus is how requests are made ambiguous, and what each one is refused for.
var corpus = []struct {
	name string
	head string
	want *Refusal // nil: carried
}{
	{"plain", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"old, no host", "GET / HTTP/1.0\r\n\r\n", nil},
	{"empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", nil},
	{"odd bytes in target", "GET /a|b\"c{}\xc3\xa9?q=100%&[x] HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"tab in value", "GET / HTTP/1.1\r\nHost: a\r\nX:\ta\tb \r\n\r\n", nil},
	{"obs-text in value", "GET / HTTP/1.1\r\nHost: a\r\nX: caf\xe9\r\n\r\n", nil},
	{"unknown method", "PURGE / HTTP/1.1\r\nHost: a\r\n\r\n", nil},

	{"bare LF after request line", "GET / HTTP/1.1\nHost: a\r\n\r\n", ErrBareLF},
	{"bare LF after field", "GET / HTTP/1.1\r\nHost: a\n\r\n", ErrBareLF},
	{"bare LF for the empty line", "GET / HTTP/1.1\r\nHost: a\r\n\n", ErrBareLF},
	{"bare LF first", "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", ErrBareLF},
	{"empty line first", "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"bare CR in value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n", ErrFieldValue},
	{"bare CR in target", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"CR CR LF", "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", ErrFieldValue},
	{"NUL in value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", ErrFieldValue},
	{"DEL in long value", "GET / HTTP/1.1\r\nHost: a\r\nX: 0123456789abc\x7fdef\r\n\r\n", ErrFieldValue},
	{"NUL in name", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length\x00: 5\r\n\r\n", ErrFieldName},
	{"obs-text in name", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length\xa0: 5\r\n\r\n", ErrFieldName},
	{"parenthesis in name", "GET / HTTP/1.1\r\nHost: a\r\nX(: 5\r\n\r\n", ErrFieldName},
	{"no colon", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length\r\n\r\n", ErrFieldName},
	{"no colon but space", "GET / HTTP/1.1\r\nHost: a\r\nContent Length\r\n\r\n", ErrFieldName},
	{"empty name", "GET / HTTP/1.1\r\nHost: a\r\n: 5\r\n\r\n", ErrFieldName},
	{"fold with space", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", ErrFold},
	{"fold with tab", "GET / HTTP/1.1\r\nHost: a\r\nX:\r\n\tchunked\r\n\r\n", ErrFold},
	{"space before the first field", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", ErrFold},
	{"space before colon", "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", ErrSpaceColon},
	{"tab before colon", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length\t: 5\r\n\r\n", ErrSpaceColon},

	{"length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", nil},
	{"length 0", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", nil},
	{"largest length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775807\r\n\r\n", nil},
	{"length and coding", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", ErrLengthCoding},
	{"coding and length", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", ErrLengthCoding},
	{"coding and length 0", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", ErrLengthCoding},
	{"two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", ErrLengthTwice},
	{"the same length twice", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\ncontent-length: 5\r\n\r\n", ErrLengthTwice},
	{"list of lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", ErrLength},
	{"empty length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n", ErrLength},
	{"plus", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", ErrLength},
	{"minus", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", ErrLength},
	{"hexadecimal length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n", ErrLength},
	{"underscore", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\n", ErrLength},
	{"space in length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 0\r\n\r\n", ErrLength},
	{"fraction", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5.0\r\n\r\n", ErrLength},
	{"overflow by one", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n", ErrLengthLarge},
	{"overflow of 64 bits", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551621\r\n\r\n", ErrLengthLarge},
	{"long overflow", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999999999999999999999999999\r\n\r\n", ErrLengthLarge},

	{"chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", nil},
	{"chunked in capitals", "POST / HTTP/1.1\r\nHost: a\r\nTRANSFER-ENCODING: ChunKed \r\n\r\n", nil},
	{"identity", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", ErrCoding},
	{"xchunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", ErrCoding},
	{"empty coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n", ErrCoding},
	{"chunked not last", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", ErrCoding},
	{"chunked then comma", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked,\r\n\r\n", ErrCoding},
	{"comma then chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked\r\n\r\n", ErrCoding},
	{"chunked twice in a list", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", ErrCoding},
	{"two coding fields", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", ErrCoding},
	{"two coding fields, the second cow", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-encoding: cow\r\n\r\n", ErrCoding},
	{"quoted", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n", ErrCoding},
	{"parameter", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;q=1\r\n\r\n", ErrCoding},
	{"vertical tab before chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", ErrFieldValue},
	{"gzip, chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", ErrCodingOther},
	{"coding in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", ErrCodingOld},

	{"no host", "GET / HTTP/1.1\r\nX: a\r\n\r\n", ErrHostMissing},
	{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", ErrHostTwice},
	{"the same host twice", "GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", ErrHostTwice},
	{"list of hosts", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", ErrHost},
	{"host with path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", ErrHost},
	{"host with credentials", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", ErrHost},
	{"host with space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", ErrHost},
	{"host with bad port", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", ErrHost},
	{"host with long port", "GET / HTTP/1.1\r\nHost: a:18446744073709551696\r\n\r\n", ErrHost},
	{"host with word port", "GET / HTTP/1.1\r\nHost: a:http\r\n\r\n", ErrHost},
	{"port without host", "GET / HTTP/1.1\r\nHost: :80\r\n\r\n", ErrHost},
	{"host and port", "GET / HTTP/1.1\r\nHost: a_b.example:8080\r\n\r\n", nil},
	{"IPv6 host", "GET / HTTP/1.1\r\nHost: [fd00::1]:8080\r\n\r\n", nil},
	{"IPv6 host unclosed", "GET / HTTP/1.1\r\nHost: [fd00::1\r\n\r\n", ErrHost},
	{"IPv6 host with zone", "GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n\r\n", ErrHost},
	{"IPv6 host with more", "GET / HTTP/1.1\r\nHost: [::1]evil\r\n\r\n", ErrHost},

	{"absolute", "GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"absolute, other case", "GET http://A/x HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"absolute, standard port", "GET http://a:80 HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"absolute, standard port in host", "GET https://a?q HTTP/1.1\r\nHost: a:443\r\n\r\n", nil},
	{"absolute, other host", "GET http://b/x HTTP/1.1\r\nHost: a\r\n\r\n", ErrHostDiffers},
	{"absolute, other port", "GET http://a:81/x HTTP/1.1\r\nHost: a\r\n\r\n", ErrHostDiffers},
	{"absolute, empty host", "GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"absolute, credentials", "GET http://a@a/x HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"absolute, no host field", "GET http://a/x HTTP/1.1\r\n\r\n", ErrHostMissing},
	{"scheme only", "GET http: HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"bad percent", "GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"short percent", "GET /%4 HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"fragment", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"relative", "GET a HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"query only", "GET ?a HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"two slashes", "GET //a/b HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"asterisk", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"asterisk with GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"connect", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", nil},
	{"connect, host without port", "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", nil},
	{"connect, other host", "CONNECT a:443 HTTP/1.1\r\nHost: b:443\r\n\r\n", ErrHostDiffers},
	{"connect, other port", "CONNECT a:443 HTTP/1.1\r\nHost: a:444\r\n\r\n", ErrHostDiffers},
	{"connect without port", "CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"connect with path", "CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"connect with length", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 3\r\n\r\n", ErrConnectBody},
	{"connect with chunks", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nTransfer-Encoding: chunked\r\n\r\n", ErrConnectBody},
	{"authority with GET", "GET a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", ErrTarget},

	{"no version", "GET /\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"two spaces", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"space in target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"space after version", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", ErrRequestLine},
	{"tab for space", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", ErrMethod},
	{"tab in target", "GET /\t HTTP/1.1\r\nHost: a\r\n\r\n", ErrTarget},
	{"space first", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", ErrMethod},
	{"method with colon", "GE:T / HTTP/1.1\r\nHost: a\r\n\r\n", ErrMethod},
	{"method only", "GET\r\n\r\n", ErrRequestLine},
	{"long method", strings.Repeat("A", 65) + " / HTTP/1.1\r\nHost: a\r\n\r\n", ErrMethodLong},
	{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ErrVersion},
	{"HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", ErrVersion},
	{"HTTP/0.9", "GET / HTTP/0.9\r\nHost: a\r\n\r\n", ErrVersion},
	{"http in small letters", "GET / http/1.1\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"HTTP/1.10", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", ErrRequestLine},
	{"HTTP/+1.1", "GET / HTTP/+1.1\r\nHost: a\r\n\r\n", ErrRequestLine},

	{"long target", "GET /" + strings.Repeat("a", 40<<10) + " HTTP/1.1\r\nHost: a\r\n\r\n", ErrTargetLong},
	{"long target without end", "GET /" + strings.Repeat("a", 40<<10), ErrTargetLong},
	{"long value", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 70<<10) + "\r\n\r\n", ErrHeadLong},
	{"long value without end", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 70<<10), ErrHeadLong},
	{"many fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: 1\r\n", 256) + "\r\n", ErrFieldCount},

	{"expect", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-Continue\r\n\r\n", nil},
	{"other expectation", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 200-ok\r\n\r\n", ErrExpectation},
	{"trailer announced", "POST / HTTP/1.1\r\nHost: a\r\nTrailer: Digest\r\nTransfer-Encoding: chunked\r\n\r\n", nil},
	{"framing trailer announced", "POST / HTTP/1.1\r\nHost: a\r\nTrailer: Digest, Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n", ErrTrailerNames},
}

func TestRequestCorpus(t *testing.T) {
	for _, c := range corpus {
		t.Run(c.name, func(t *testing.T) {
			for _, piece := range []int{1, 3, 1 << 20} {
				if piece < 16 && len(c.head) > 4096 {
					continue
				}
				r, err := parseRequest(c.head, piece)
				if err != c.want {
					t.Fatalf("pieces of %d: got %v, want %v", piece, err, c.want)
				}
				if err == nil && r.Size != len(c.head) {
					t.Fatalf("pieces of %d: head of %d bytes, want %d", piece, r.Size, len(c.head))
				}
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Refusals {
		if seen[r.Reason] {
			t.Errorf("reason %q is there twice", r.Reason)
		}
		seen[r.Reason] = true
		if r.Status < 400 || r.Status > 599 || r.Text == "" || !strings.HasPrefix(r.Section, "RFC ") {
			t.Errorf("incomplete refusal: %+v", r)
		}
	}
}

func TestRequestParts(t *testing.T) {
	const text = "POST http://shop.example:80/cart?x=1 HTTP/1.1\r\nhOST:\t Shop.Example \r\n" +
		"Connection: x, Close ,upgrade\r\nUpgrade: h2c, WebSocket\r\nExpect: 100-continue\r\n" +
		"Authorization: negotiate YII=\r\nContent-Length: 42\r\n\r\nrest"
	var r Request
	ok, err := r.Parse([]byte(text), &limits)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	got := fmt.Sprintf("%s %s %s %s %d", r.Method, r.Target, r.Host, r.Authority, r.Length)
	if want := "POST http://shop.example:80/cart?x=1 Shop.Example shop.example:80 42"; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if r.Size != len(text)-len("rest") {
		t.Errorf("size %d", r.Size)
	}
	if !r.Close || r.Persistent() || !r.Upgrade || !r.WebSocket || !r.Expect || !r.BoundAuth || r.Idempotent || !r.HasBody() {
		t.Errorf("%+v", r)
	}
}

func TestRequestPersistence(t *testing.T) {
	for head, want := range map[string]bool{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n":                                             true,
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n":                        false,
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: foo\r\nConnection: x,CLOSE\r\n\r\n":   false,
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: closed\r\n\r\n":                       true,
		"GET / HTTP/1.0\r\n\r\n":                                                        false,
		"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n":                              true,
		"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n":                       false,
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\nX-Close: close\r\n\r\n": true,
	} {
		r, err := parseRequest(head, 1<<20)
		if err != nil || r.Persistent() != want {
			t.Errorf("%q: %v %v, want %v", head, err, r.Persistent(), want)
		}
	}
}

func TestRequestLargerLimits(t *testing.T) {
	lim := Limits{Head: 1 << 20, Target: 1 << 19, Fields: 1000}.WithDefaults()
	text := []byte("GET /" + strings.Repeat("a", 400<<10) + " HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: 1\r\n", 900) + "\r\n")
	var r Request
	if ok, err := r.Parse(text, &lim); !ok || err != nil || len(r.Target) != 400<<10+1 {
		t.Fatal(ok, err, len(r.Target))
	}
}

var browser = []byte("GET /index.html?session=1234567890 HTTP/1.1\r\nHost: payments.bank:8080\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
	"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\nAccept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\nConnection: keep-alive\r\n" +
	"Cookie: a=0123456789abcdef0123456789abcdef; b=0123456789abcdef\r\nX-Request-ID: 7c1c2b5e-9a1e-4f7e-8a53-4e9e6f3f2c11\r\n\r\n")

func BenchmarkRequest(b *testing.B) {
	small := []byte("GET / HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\r\n")
	for name, head := range map[string][]byte{"small": small, "browser": browser} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(head)))
			var r Request
			for b.Loop() {
				r.Reset()
				if ok, err := r.Parse(head, &limits); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

func TestParseAllocations(t *testing.T) {
	response := []byte("HTTP/1.1 200 OK\r\nServer: x\r\nTransfer-Encoding: chunked\r\n\r\n")
	chunks := []byte("5;x=y\r\nhello\r\n0\r\nDigest: x\r\n\r\n")
	bad := []byte("GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n")
	var (
		q Request
		r Response
	)
	if n := testing.AllocsPerRun(100, func() {
		q.Reset()
		q.Parse(browser, &limits)
		q.Reset()
		q.Parse(bad, &limits)
		r.Reset()
		r.Parse(response, &limits)
		body := r.Body(false, false, &limits)
		if n, err := body.Advance(chunks); n != len(chunks) || err != nil || !body.Done() {
			t.Fatal(n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

func TestIncompleteHeadIsNotComplete(t *testing.T) {
	for n := range browser {
		var r Request
		if ok, err := r.Parse(browser[:n], &limits); ok || err != nil {
			t.Fatalf("%d bytes: %v %v", n, ok, err)
		}
		if r.Begun() != (n > 0) {
			t.Fatalf("%d bytes: begun %v", n, r.Begun())
		}
		if ok, err := r.Parse(bytes.Clone(browser), &limits); !ok || err != nil || string(r.Method) != "GET" {
			t.Fatalf("%d bytes and the rest: %v %v", n, ok, err)
		}
	}
}
