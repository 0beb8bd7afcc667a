package detect

// Speech is what a server's first bytes say.
type Speech uint8

const (
	Silent   Speech = iota
	Partial         // may become one of the next two
	HTTPText        // begins with HTTP/
	Settings        // an HTTP/2 SETTINGS frame
	Other           // decides: opaque
)

const frameHeader = 9 // RFC 9113 section 4.1

// Server looks at the first bytes of a server.
func Server(p []byte) Speech {
	if len(p) == 0 {
		return Silent
	}
	const text = "HTTP/"
	if n := min(len(p), len(text)); string(p[:n]) == text[:n] {
		if n == len(text) {
			return HTTPText
		}
		return Partial
	}
	// A server's preface is a SETTINGS frame without ACK on stream 0, its length a
	// multiple of six, and small: there are few settings (RFC 9113 section 6.5).
	want := [frameHeader]byte{3: 4}
	for i, c := range p[:min(len(p), frameHeader)] {
		switch i {
		case 1:
			if c > 4 {
				return Other
			}
		case 2:
		default:
			if c != want[i] {
				return Other
			}
		}
	}
	if len(p) < frameHeader {
		return Partial
	}
	if (int(p[1])<<8|int(p[2]))%6 != 0 {
		return Other
	}
	return Settings
}
