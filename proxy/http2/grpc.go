package http2

import "strconv"

// messages counts the length-prefixed messages of a gRPC body as its bytes pass: a flag,
// four bytes of length, and so many bytes.
type messages struct {
	n      uint64
	left   uint32 // of the message
	prefix uint32 // its length as far as it is known
	have   uint8  // bytes of the prefix
}

func (m *messages) feed(p []byte) {
	for len(p) > 0 {
		if m.left > 0 {
			k := min(uint64(m.left), uint64(len(p)))
			m.left -= uint32(k)
			p = p[k:]
			continue
		}
		if m.have > 0 {
			m.prefix = m.prefix<<8 | uint32(p[0])
		}
		m.have++
		p = p[1:]
		if m.have == 5 {
			m.n++
			m.left, m.have, m.prefix = m.prefix, 0, 0
		}
	}
}

// between reports whether no message is cut.
func (m *messages) between() bool { return m.left == 0 && m.have == 0 }

// statusCodes is how many codes gRPC defines.
const statusCodes = 17

// parseStatusCode reads grpc-status. What is no known code is UNKNOWN, as clients take it.
func parseStatusCode(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n >= statusCodes {
		return 2
	}
	return n
}

// ServerFault reports whether a gRPC status says that the server failed, as a 5xx does:
// UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
func ServerFault(code int) bool {
	switch code {
	case 2, 4, 12, 13, 14, 15:
		return true
	}
	return false
}
