package http1

import "bytes"

// Bytes of a target: everything but controls, space, DEL and '#' passes here. RFC
// 3986 allows fewer, but programs send and accept them ('|', '"', UTF-8) and none
// changes where a message ends. '#' is refused because some servers cut there.

// route checks the target's form (RFC 9112 section 3.2) and sets Authority.
func (r *Request) route() *Refusal {
	host, port, ok := splitAuthority(r.Host)
	if !ok {
		return ErrHost
	}
	r.Authority = r.Host
	t := r.Target
	switch {
	case r.IsConnect: // authority-form
		h, p, ok := splitAuthority(t)
		if !ok || len(h) == 0 || len(p) == 0 {
			return ErrTarget
		}
		r.Authority = t
		if r.hasHost && (!sameFold(h, host) || len(port) > 0 && string(port) != string(p)) {
			return ErrHostDiffers
		}
		return nil
	case t[0] == '/': // origin-form
		return checkPath(t)
	case len(t) == 1 && t[0] == '*': // asterisk-form
		if string(r.Method) != "OPTIONS" {
			return ErrTarget
		}
		return nil
	}
	return r.absolute(host, port)
}

// absolute checks an absolute-form target: "scheme://authority/path?query".
func (r *Request) absolute(host, port []byte) *Refusal {
	t := r.Target
	i := bytes.IndexByte(t, ':')
	if i <= 0 || !bytes.HasPrefix(t[i:], []byte("://")) || !all(t[:i], schemeByte) || !isLetter(t[0]) {
		return ErrTarget
	}
	scheme, rest := t[:i], t[i+3:]
	end := bytes.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	// Credentials in an authority are refused (RFC 9110 section 4.2.4): '@' is no hostByte.
	h, p, ok := splitAuthority(rest[:end])
	if !ok || len(h) == 0 {
		return ErrTarget
	}
	if err := checkPath(rest[end:]); err != nil {
		return err
	}
	r.Authority = rest[:end]
	if r.hasHost && (!sameFold(h, host) || !samePort(scheme, p, port)) {
		return ErrHostDiffers
	}
	return nil
}

// samePort compares ports; a missing one is the scheme's own.
func samePort(scheme, a, b []byte) bool {
	standard := ""
	switch {
	case equalFold(scheme, "http"):
		standard = "80"
	case equalFold(scheme, "https"):
		standard = "443"
	}
	if len(a) == 0 {
		return len(b) == 0 || string(b) == standard
	}
	if len(b) == 0 {
		return string(a) == standard
	}
	return string(a) == string(b)
}

// checkPath refuses a malformed percent-encoding in the path, which servers decode
// differently; a query is the application's own.
func checkPath(t []byte) *Refusal {
	if q := bytes.IndexByte(t, '?'); q >= 0 {
		t = t[:q]
	}
	for {
		i := bytes.IndexByte(t, '%')
		if i < 0 {
			return nil
		}
		if len(t) < i+3 || class[t[i+1]]&class[t[i+2]]&hexByte == 0 {
			return ErrTarget
		}
		t = t[i+3:]
	}
}

// splitAuthority checks "host", "host:port" and "[IPv6]:port"; an empty one is
// valid (RFC 9112 section 3.2).
func splitAuthority(b []byte) (host, port []byte, ok bool) {
	if len(b) > 0 && b[0] == '[' {
		i := bytes.IndexByte(b, ']')
		if i < 0 || !validIPv6(b[1:i]) {
			return nil, nil, false
		}
		host, b = b[:i+1], b[i+1:]
		if len(b) > 0 && b[0] != ':' {
			return nil, nil, false
		}
	} else {
		i := bytes.IndexByte(b, ':')
		if i < 0 {
			i = len(b)
		}
		host, b = b[:i], b[i:]
		if !all(host, hostByte) {
			return nil, nil, false
		}
	}
	if len(b) == 0 {
		return host, nil, true
	}
	port = b[1:]
	n := 0
	for _, c := range port {
		if !isDigit(c) || n > 6553 {
			return nil, nil, false
		}
		n = n*10 + int(c-'0')
	}
	return host, port, n <= 65535 && len(host) > 0
}

// validIPv6 reports whether b is an IPv6 address without a zone (RFC 3986 section
// 3.2.2).
func validIPv6(b []byte) bool {
	groups, gap := 0, false
	if bytes.HasPrefix(b, []byte("::")) {
		gap, b = true, b[2:]
		if len(b) == 0 {
			return true
		}
	}
	for {
		n := 0
		for n < len(b) && class[b[n]]&hexByte != 0 {
			n++
		}
		if n < len(b) && b[n] == '.' {
			return validIPv4(b) && (gap && groups <= 5 || !gap && groups == 6)
		}
		if n == 0 || n > 4 {
			return false
		}
		groups++
		if b = b[n:]; len(b) == 0 {
			return gap && groups <= 7 || !gap && groups == 8
		}
		if b[0] != ':' || len(b) == 1 {
			return false
		}
		if b = b[1:]; b[0] == ':' {
			if gap {
				return false
			}
			gap = true
			if b = b[1:]; len(b) == 0 {
				return groups <= 7
			}
		}
	}
}

// validIPv4 reports whether b is four decimal octets without leading zeros.
func validIPv4(b []byte) bool {
	for part := range 4 {
		i := bytes.IndexByte(b, '.')
		if part == 3 {
			if i >= 0 {
				return false
			}
			i = len(b)
		}
		if i < 1 || i > 3 || b[0] == '0' && i > 1 {
			return false
		}
		n := 0
		for _, c := range b[:i] {
			if !isDigit(c) {
				return false
			}
			n = n*10 + int(c-'0')
		}
		if n > 255 {
			return false
		}
		if part < 3 {
			b = b[i+1:]
		}
	}
	return true
}

func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
