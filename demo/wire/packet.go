package wire

import (
	"encoding/binary"
	"net/netip"
)

// TCP flags.
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	_
	flagACK
)

const (
	protoTCP = 6
	protoUDP = 17
)

// segment is what a packet says in its headers.
type segment struct {
	src, dst netip.AddrPort
	proto    uint8
	seq      uint32
	flags    uint8
	payload  []byte // what follows the TCP or UDP header
}

// parse reads an IPv4 or IPv6 packet. It returns false for what has no ports:
// fragments after the first, other protocols, packets cut short.
func parse(p []byte) (segment, bool) {
	if len(p) == 0 {
		return segment{}, false
	}
	var (
		s        segment
		src, dst netip.Addr
		rest     []byte
	)
	switch p[0] >> 4 {
	case 4: // RFC 791
		hdr := int(p[0]&15) * 4
		if len(p) < 20 || hdr < 20 || len(p) < hdr {
			return s, false
		}
		total := int(binary.BigEndian.Uint16(p[2:]))
		if total == 0 { // a packet that is still to be segmented by the device
			total = len(p)
		}
		if total < hdr || total > len(p) || binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
			return s, false
		}
		s.proto = p[9]
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		rest = p[hdr:total]
	case 6: // RFC 8200
		if len(p) < 40 {
			return s, false
		}
		n := int(binary.BigEndian.Uint16(p[4:]))
		if n == 0 {
			n = len(p) - 40
		}
		if 40+n > len(p) {
			return s, false
		}
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		rest = p[40 : 40+n]
		s.proto = p[6]
		for s.proto == 0 || s.proto == 43 || s.proto == 60 { // hop-by-hop, routing, destination options
			if len(rest) < 8 {
				return s, false
			}
			skip := int(rest[1])*8 + 8
			if len(rest) < skip {
				return s, false
			}
			s.proto, rest = rest[0], rest[skip:]
		}
	default:
		return s, false
	}
	switch s.proto {
	case protoTCP: // RFC 9293 section 3.1
		if len(rest) < 20 {
			return s, false
		}
		hdr := int(rest[12]>>4) * 4
		if hdr < 20 || len(rest) < hdr {
			return s, false
		}
		s.seq = binary.BigEndian.Uint32(rest[4:])
		s.flags = rest[13]
		s.payload = rest[hdr:]
	case protoUDP:
		if len(rest) < 8 {
			return s, false
		}
		s.payload = rest[8:]
	default:
		return s, false
	}
	s.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(rest))
	s.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(rest[2:]))
	return s, true
}
