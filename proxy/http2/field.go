package http2

import (
	"encoding/binary"
	"net/netip"
	"strings"
)

// Byte classes.
const (
	nameByte   = 1 << iota // of a token (RFC 9110 section 5.6.2) in lower case
	tokenByte              // of any token
	valueByte              // of a field value: no controls but HTAB
	hostByte               // RFC 3986 section 3.2.2, reg-name without percent-encoding
	hexByte                //
	schemeByte             // RFC 3986 section 3.1
	pathByte               // of a target: as HTTP/1's, see docs/http2.md
)

var class = func() (t [256]uint8) {
	mark := func(bit uint8, s string) {
		for i := range len(s) {
			t[s[i]] |= bit
		}
	}
	const digits, lower, upper = "0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	mark(nameByte|tokenByte, digits+lower+"!#$%&'*+-.^_`|~")
	mark(tokenByte, upper)
	mark(hostByte, digits+lower+upper+"-._~!$&'()*+;=")
	mark(schemeByte, digits+lower+upper+"+-.")
	mark(hexByte, digits+"abcdefABCDEF")
	for c := 0x20; c < 256; c++ {
		if c != 0x7f {
			t[c] |= valueByte
			if c != ' ' && c != '#' {
				t[c] |= pathByte
			}
		}
	}
	t['\t'] |= valueByte
	return t
}()

// all reports whether each byte of s is of the class.
func all(s string, bit uint8) bool {
	for i := range len(s) {
		if class[s[i]]&bit == 0 {
			return false
		}
	}
	return true
}

func validName(s string) bool { return len(s) > 0 && all(s, nameByte) }

func validValue(s string) bool {
	if len(s) == 0 {
		return true
	}
	if space(s[0]) || space(s[len(s)-1]) {
		return false
	}
	return all(s, valueByte)
}

func space(c byte) bool { return c == ' ' || c == '\t' }

func digit(c byte) bool { return c-'0' <= 9 }

func validMethod(s string) bool { return len(s) > 0 && len(s) <= 64 && all(s, tokenByte) }

func validScheme(s string) bool {
	return len(s) > 0 && len(s) <= 64 && class[s[0]]&tokenByte != 0 && (s[0]|0x20) >= 'a' && (s[0]|0x20) <= 'z' && all(s, schemeByte)
}

// validPath checks the bytes of :path, and the percent-encoding before the query, which
// servers decode differently; the query is the application's own.
func validPath(s string) bool {
	if !all(s, pathByte) {
		return false
	}
	if q := strings.IndexByte(s, '?'); q >= 0 {
		s = s[:q]
	}
	for {
		i := strings.IndexByte(s, '%')
		if i < 0 {
			return true
		}
		if len(s) < i+3 || class[s[i+1]]&class[s[i+2]]&hexByte == 0 {
			return false
		}
		s = s[i+3:]
	}
}

// splitAuthority checks "host", "host:port" and "[IPv6]:port"; an IPv6 address has no zone
// (RFC 3986 section 3.2.2).
func splitAuthority(s string) (host, port string, ok bool) {
	if len(s) > 0 && s[0] == '[' {
		i := strings.IndexByte(s, ']')
		if i < 3 || i > 46 {
			return "", "", false
		}
		if a, err := netip.ParseAddr(s[1:i]); err != nil || !a.Is6() || a.Zone() != "" {
			return "", "", false
		}
		host, s = s[:i+1], s[i+1:]
		if len(s) > 0 && s[0] != ':' {
			return "", "", false
		}
	} else {
		i := strings.IndexByte(s, ':')
		if i < 0 {
			i = len(s)
		}
		host, s = s[:i], s[i:]
		if len(host) == 0 || !all(host, hostByte) {
			return "", "", false
		}
	}
	if len(s) == 0 {
		return host, "", true
	}
	port = s[1:]
	n := 0
	for i := range len(port) {
		if !digit(port[i]) || n > 6553 {
			return "", "", false
		}
		n = n*10 + int(port[i]-'0')
	}
	return host, port, n <= 65535
}

// sameAuthority compares an authority with a Host field: case and the scheme's own port
// do not count.
func sameAuthority(scheme, a, b string) bool {
	if a == b {
		return true
	}
	ah, ap, ok := splitAuthority(a)
	bh, bp, also := splitAuthority(b)
	if !ok || !also || !strings.EqualFold(ah, bh) {
		return false
	}
	standard := ""
	switch scheme {
	case "http":
		standard = "80"
	case "https":
		standard = "443"
	}
	if ap == "" {
		ap = standard
	}
	if bp == "" {
		bp = standard
	}
	return ap == bp
}

// interner turns bytes into strings that were made before, if there are such: most
// fields of a connection's messages are the same again and again. Sets of four, the last
// used first.
type interner struct{ sets [16][4]string }

const internLimit = 256

// get returns b as a string, and whether it was seen before.
func (t *interner) get(b []byte) (s string, seen bool) {
	if len(b) == 0 {
		return "", true
	}
	if len(b) > internLimit {
		return string(b), false
	}
	set := &t.sets[mix(b)%uint32(len(t.sets))]
	i := 0
	for ; i < len(set); i++ {
		if set[i] == string(b) {
			s, seen = set[i], true
			break
		}
	}
	if !seen {
		s, i = string(b), len(set)-1
	}
	copy(set[1:i+1], set[:i])
	set[0] = s
	return s, seen
}

// mix is a hash of the length and both ends.
func mix(b []byte) uint32 {
	n := len(b)
	var x uint64
	switch {
	case n >= 8:
		x = binary.LittleEndian.Uint64(b) ^ binary.LittleEndian.Uint64(b[n-8:])*0x9e3779b97f4a7c15
	case n >= 4:
		x = uint64(binary.LittleEndian.Uint32(b))<<32 | uint64(binary.LittleEndian.Uint32(b[n-4:]))
	default:
		x = uint64(b[0])<<16 | uint64(b[n/2])<<8 | uint64(b[n-1])
	}
	x = (x ^ uint64(n)) * 0xff51afd7ed558ccd
	return uint32(x >> 40)
}
