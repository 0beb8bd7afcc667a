package http1

import "encoding/binary"

// Byte classes.
const (
	tokenByte  = 1 << iota // RFC 9110 section 5.6.2
	targetByte             // what a request target may hold, see target.go
	hostByte               // RFC 3986 section 3.2.2, reg-name without percent-encoding and comma
	hexByte
	schemeByte // RFC 3986 section 3.1
)

var class = func() (t [256]uint8) {
	mark := func(bit uint8, s string) {
		for i := range len(s) {
			t[s[i]] |= bit
		}
	}
	const digits, letters = "0123456789", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	mark(tokenByte|hostByte|schemeByte, digits+letters)
	mark(tokenByte, "!#$%&'*+-.^_`|~")
	mark(hostByte, "-._~!$&'()*+;=")
	mark(schemeByte, "+-.")
	mark(hexByte, digits+"abcdefABCDEF")
	for c := 0x21; c < 256; c++ {
		if c != 0x7f && c != '#' {
			t[c] |= targetByte
		}
	}
	return t
}()

// tokenLen returns how many bytes at the start of b belong to a token.
func tokenLen(b []byte) int {
	for i, c := range b {
		if class[c]&tokenByte == 0 {
			return i
		}
	}
	return len(b)
}

// all reports whether each byte of b is of one of the classes in bits.
func all(b []byte, bits uint8) bool {
	for _, c := range b {
		if class[c]&bits == 0 {
			return false
		}
	}
	return true
}

// validValue reports whether b has no control byte but HTAB (RFC 9110 section
// 5.5). Eight bytes at a time; the borrow of a smaller byte can only make it look
// closer.
func validValue(b []byte) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	for len(b) >= 8 {
		w := binary.LittleEndian.Uint64(b)
		del := w ^ 0x7f*ones
		if ((w-0x20*ones)&^w|(del-ones)&^del)&high != 0 && !validBytes(b[:8]) {
			return false
		}
		b = b[8:]
	}
	return validBytes(b)
}

func validBytes(b []byte) bool {
	for _, c := range b {
		if c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// trim removes optional white space (RFC 9110 section 5.6.3) at both ends.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// equalFold reports whether b is lower without regard to case. lower is letters
// and '-'; b has no control bytes, so setting bit 5 maps nothing else onto them.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i := range len(b) {
		if b[i]|0x20 != lower[i] {
			return false
		}
	}
	return true
}

// sameFold compares two byte strings without regard to the case of ASCII letters.
func sameFold(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}

// nextItem splits the first element off a comma-separated list (RFC 9110 section
// 5.6.1).
func nextItem(list []byte) (item, rest []byte) {
	for i, c := range list {
		if c == ',' {
			return trim(list[:i]), list[i+1:]
		}
	}
	return trim(list), nil
}
