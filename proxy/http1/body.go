package http1

import "assay.dev/proxy/route"

// Framing is how the end of a body is found (RFC 9112 section 6.3).
type Framing uint8

const (
	NoBody     Framing = iota // the message ends with its head
	Length                    // Content-Length
	Chunks                    // Transfer-Encoding: chunked
	UntilClose                // a response that ends with its connection
	Tunnel                    // after 101, or 2xx to CONNECT: no longer HTTP, in both directions
)

func (f Framing) String() string {
	return [...]string{"none", "length", "chunked", "until-close", "tunnel"}[f]
}

// Body follows a body through the bytes of its connection. It holds none of them.
type Body struct {
	Framing Framing
	left    int64 // of the body, or of the chunk
	lim     *Limits
	edit    *route.HeadEdit // of the head: what it drops may be no trailer either; nil for none
	chunk   chunkState
}

// Done reports whether the body is complete. One that lasts until close never is.
func (b *Body) Done() bool {
	switch b.Framing {
	case NoBody:
		return true
	case Length:
		return b.left == 0
	case Chunks:
		return b.chunk.step == chunkDone
	}
	return false
}

// Advance takes the next bytes of the connection and returns how many of them
// belong to this message. Bytes beyond a body that is done belong to the next one.
func (b *Body) Advance(p []byte) (n int, err *Refusal) {
	switch b.Framing {
	case NoBody:
		return 0, nil
	case Length:
		n = int(min(int64(len(p)), b.left))
		b.left -= int64(n)
		return n, nil
	case Chunks:
		return b.advanceChunks(p)
	}
	return len(p), nil
}
