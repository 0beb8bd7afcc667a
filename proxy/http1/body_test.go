package http1

import (
	"strings"
	"testing"
)

// advance feeds text in pieces and returns how much belonged to the body.
func advance(b *Body, text string, piece int) (int, *Refusal) {
	at := 0
	for at < len(text) && !b.Done() {
		end := min(at+piece, len(text))
		n, err := b.Advance([]byte(text[at:end]))
		if err != nil {
			return at + n, err
		}
		at += n
		if n < end-at && b.Done() {
			break
		}
	}
	return at, nil
}

func TestChunkCorpus(t *testing.T) {
	for _, c := range []struct {
		text string
		want *Refusal
		done bool
	}{
		{"0\r\n\r\n", nil, true},
		{"5\r\nhello\r\n0\r\n\r\n", nil, true},
		{"5\r\nhello\r\n000\r\n\r\n", nil, true},
		{"A\r\n0123456789\r\n0\r\n\r\n", nil, true},
		{"5;a=b;c=\"d\"\r\nhello\r\n0;last\r\n\r\n", nil, true},
		{"5\r\nhello\r\n0\r\nDigest: x\r\nX:\r\n\r\n", nil, true},
		{"5\r\nhello\r\n0\r\n", nil, false},
		{"5\r\nhel", nil, false},
		{"3fffffffffffffff\r\nx", nil, false},

		{"5\nhello\r\n0\r\n\r\n", ErrChunkSize, false},
		{"5\r\nhello\n0\r\n\r\n", ErrChunkEnd, false},
		{"5\r\nhello\r0\r\n\r\n", ErrChunkEnd, false},
		{"5\r\nhelloX\r\n0\r\n\r\n", ErrChunkEnd, false},
		{"5\r\nhello\r\n0\r\n\n", ErrTrailer, false},
		{"5\r\nhello\r\n0\r\n\rX", ErrTrailer, false},
		{"\r\nhello", ErrChunkSize, false},
		{";a\r\nhello", ErrChunkSize, false},
		{" 5\r\nhello", ErrChunkSize, false},
		{"5 \r\nhello", ErrChunkSize, false},
		{"5 ;a=b\r\nhello\r\n0\r\n\r\n", ErrChunkSize, false},
		{"+5\r\nhello", ErrChunkSize, false},
		{"-5\r\nhello", ErrChunkSize, false},
		{"0x5\r\nhello", ErrChunkSize, false},
		{"5_0\r\nhello", ErrChunkSize, false},
		{"g\r\n", ErrChunkSize, false},
		{"5\rX", ErrChunkSize, false},
		{"4000000000000000\r\n", ErrChunkLarge, false},
		{"ffffffffffffffff\r\n", ErrChunkLarge, false},
		{"10000000000000005\r\n", ErrChunkLarge, false},
		{"00000000000000005\r\n", ErrChunkLarge, false},
		{"5;a\nhello\r\n", ErrChunkExt, false},
		{"5;a\x00\r\nhello\r\n", ErrChunkExt, false},
		{"5;a\rX", ErrChunkSize, false},
		{"5;" + strings.Repeat("a", 5000) + "\r\n", ErrChunkExt, false},
		{strings.Repeat("1;"+strings.Repeat("a", 100)+"\r\nx\r\n", 50), ErrChunkExt, false},
		{"0\r\n Folded: x\r\n\r\n", ErrTrailer, false},
		{"0\r\nX : x\r\n\r\n", ErrTrailer, false},
		{"0\r\nX: a\r\n b\r\n\r\n", ErrTrailer, false},
		{"0\r\nX\r\n\r\n", ErrTrailer, false},
		{"0\r\n: x\r\n\r\n", ErrTrailer, false},
		{"0\r\nX: \x00\r\n\r\n", ErrTrailer, false},
		{"0\r\nX: a\n\r\n", ErrTrailer, false},
		{"0\r\nX: a\rb\r\n\r\n", ErrTrailer, false},
		{"0\r\nContent-Length: 5\r\n\r\n", ErrTrailerField, false},
		{"0\r\nTRANSFER-encoding: chunked\r\n\r\n", ErrTrailerField, false},
		{"0\r\nHost: x\r\n\r\n", ErrTrailerField, false},
		{"0\r\nX: " + strings.Repeat("a", 70<<10), ErrTrailerLength, false},
		{"0\r\n" + strings.Repeat("X: a\r\n", 300), ErrTrailerLength, false},
	} {
		for _, piece := range []int{1, 2, 7, 1 << 20} {
			b := Body{Framing: Chunks, lim: &limits}
			n, err := advance(&b, c.text, piece)
			if err != c.want || b.Done() != c.done {
				t.Errorf("%.40q in pieces of %d: %v done %v, want %v %v", c.text, piece, err, b.Done(), c.want, c.done)
			} else if err == nil && n != len(c.text) {
				t.Errorf("%.40q in pieces of %d: %d bytes, want %d", c.text, piece, n, len(c.text))
			}
		}
	}
}

func TestChunkExtensionsOutweighedByData(t *testing.T) {
	text := strings.Repeat("80;signature="+strings.Repeat("a", 64)+"\r\n"+strings.Repeat("x", 128)+"\r\n", 1000) + "0\r\n\r\n"
	b := Body{Framing: Chunks, lim: &limits}
	if n, err := b.Advance([]byte(text)); n != len(text) || err != nil || !b.Done() {
		t.Fatal(n, err)
	}
}

func TestBodyLeavesWhatFollows(t *testing.T) {
	const next = "GET / HTTP/1.1\r\n"
	for _, c := range []struct {
		body Body
		text string
	}{
		{Body{}, ""},
		{Body{Framing: Length, left: 5}, "hello"},
		{Body{Framing: Chunks, lim: &limits}, "5\r\nhello\r\n0\r\nX: y\r\n\r\n"},
	} {
		for _, piece := range []int{1, 3, 1 << 20} {
			b := c.body
			if n, err := advance(&b, c.text+next, piece); n != len(c.text) || err != nil || !b.Done() {
				t.Errorf("%s: %d bytes, %v, done %v; want %d", c.body.Framing, n, err, b.Done(), len(c.text))
			}
			if n, err := b.Advance([]byte(next)); n != 0 || err != nil {
				t.Errorf("%s: took %d bytes after its end, %v", c.body.Framing, n, err)
			}
		}
	}
}

func BenchmarkChunked(b *testing.B) {
	text := []byte("1f4\r\n" + strings.Repeat("x", 500) + "\r\n1f4;a=b\r\n" + strings.Repeat("y", 500) + "\r\n0\r\n\r\n")
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		body := Body{Framing: Chunks, lim: &limits}
		if n, err := body.Advance(text); n != len(text) || err != nil || !body.Done() {
			b.Fatal(n, err)
		}
	}
}
