package proxy

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"assay.dev"
)

// Header is the first part of every stream's opening: what the client's proxy knows
// and the server's cannot see. On the wire, numbers big-endian:
//
//	0   version       1
//	1   flags         0; others are refused
//	2   protocol      1 http1, 2 http2, 3 tls, 4 opaque
//	3   port dialled  uint16, never 0
//	5   client port   uint16, 0 when there is none
//	7   family        0 none, 4 or 6
//	8   original destination: address (4 or 16 bytes) and port (uint16), none for family 0
//	    service key: length (one byte, at most 127) and text, "NAMESPACE/NAME" or ""
//
// Everything in it is a hint by an authenticated peer: it names the series that the
// stream is counted under and how its bytes are read. It decides no access, and the
// server dials only the port that the connection came to.
type Header struct {
	Protocol    assay.Protocol
	Port        uint16 // as the application dialled it
	ClientPort  uint16
	Destination netip.AddrPort // as the application dialled it
	Service     string
}

const (
	headerVersion = 1
	// maxHeader is the size of the largest header.
	maxHeader = 8 + 18 + 1 + maxServiceKey
	// maxServiceKey is two names and a slash.
	maxServiceKey = 63 + 1 + 63
)

var wireProtocols = [...]assay.Protocol{1: assay.HTTP1, 2: assay.HTTP2, 3: assay.TLS, 4: assay.Opaque}

// AppendTo writes the header; it allocates nothing when b has room for maxHeader.
func (h *Header) AppendTo(b []byte) []byte {
	proto := byte(4)
	for i, p := range wireProtocols {
		if i > 0 && p == h.Protocol {
			proto = byte(i)
		}
	}
	b = append(b, headerVersion, 0, proto)
	b = binary.BigEndian.AppendUint16(b, h.Port)
	b = binary.BigEndian.AppendUint16(b, h.ClientPort)
	switch a := h.Destination.Addr().Unmap(); {
	case a.Is4():
		raw := a.As4()
		b = append(append(b, 4), raw[:]...)
		b = binary.BigEndian.AppendUint16(b, h.Destination.Port())
	case a.Is6():
		raw := a.As16()
		b = append(append(b, 6), raw[:]...)
		b = binary.BigEndian.AppendUint16(b, h.Destination.Port())
	default:
		b = append(b, 0)
	}
	service := h.Service
	if len(service) > maxServiceKey {
		service = ""
	}
	b = append(b, byte(len(service)))
	return append(b, service...)
}

// headerProtocol returns the protocol of a header that is not parsed yet, "" when p is
// none.
func headerProtocol(p []byte) assay.Protocol {
	if len(p) > 2 && p[0] == headerVersion && int(p[2]) < len(wireProtocols) {
		return wireProtocols[p[2]]
	}
	return ""
}

var (
	errHeaderShort   = errors.New("stream header: cut short")
	errHeaderVersion = errors.New("stream header: of a version that this proxy does not know")
	errHeaderValue   = errors.New("stream header: malformed")
)

// ParseHeader reads a header from the front of p and returns what follows it. It
// accepts exactly what AppendTo writes.
func ParseHeader(p []byte) (h Header, rest []byte, err error) {
	if len(p) < 1 {
		return h, nil, errHeaderShort
	}
	if p[0] != headerVersion {
		return h, nil, errHeaderVersion
	}
	if len(p) < 9 {
		return h, nil, errHeaderShort
	}
	if p[1] != 0 || p[2] == 0 || int(p[2]) >= len(wireProtocols) {
		return h, nil, errHeaderValue
	}
	h.Protocol = wireProtocols[p[2]]
	h.Port = binary.BigEndian.Uint16(p[3:])
	h.ClientPort = binary.BigEndian.Uint16(p[5:])
	size := 0
	switch p[7] {
	case 0:
	case 4:
		size = 4
	case 6:
		size = 16
	default:
		return h, nil, errHeaderValue
	}
	if h.Port == 0 {
		return h, nil, errHeaderValue
	}
	p = p[8:]
	if size > 0 {
		if len(p) < size+3 {
			return h, nil, errHeaderShort
		}
		a, _ := netip.AddrFromSlice(p[:size])
		if a.Is4In6() {
			return h, nil, errHeaderValue
		}
		h.Destination = netip.AddrPortFrom(a, binary.BigEndian.Uint16(p[size:]))
		p = p[size+2:]
	}
	n := int(p[0])
	p = p[1:]
	if n > maxServiceKey {
		return h, nil, errHeaderValue
	}
	if len(p) < n {
		return h, nil, errHeaderShort
	}
	if n > 0 && !validServiceKey(p[:n]) {
		return h, nil, errHeaderValue
	}
	h.Service = string(p[:n])
	return h, p[n:], nil
}

// validServiceKey wants two labels and one slash: the key ends up in metrics.
func validServiceKey(p []byte) bool {
	slash := -1
	for i, c := range p {
		switch {
		case c == '/':
			if slash >= 0 {
				return false
			}
			slash = i
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-':
		default:
			return false
		}
	}
	return slash > 0 && slash <= 63 && len(p)-slash-1 > 0 && len(p)-slash-1 <= 63
}
