package proxy

import (
	"syscall"

	"assay.dev/proxy/nowait"
	"golang.org/x/sys/unix"
)

// sniffer looks at the first bytes of a connection without taking them: whoever
// serves it reads them again. It borrows a buffer only while there is something to
// look at.
type sniffer struct {
	conn nowait.Conn
	raw  syscall.RawConn
	buf  *[relayBuffer]byte
	n    int  // bytes in buf
	end  bool // the peer finished sending
	err  error
	fn   func(fd uintptr) bool
}

func newSniffer(c nowait.Conn, raw syscall.RawConn) *sniffer {
	s := &sniffer{conn: c, raw: raw}
	s.fn = s.try
	return s
}

// bytes returns what has been seen.
func (s *sniffer) bytes() []byte {
	if s.buf == nil {
		return nil
	}
	return s.buf[:s.n]
}

// more waits until there is more to see than before: bytes, or the end. It returns
// a deadline error when the connection's deadline passes and there is nothing.
func (s *sniffer) more() error {
	s.err = nil
	err := s.raw.Read(s.fn)
	if err != nil && isTimeout(err) {
		// On a busy machine it may be us who are late, not the bytes.
		late := false
		if e := s.raw.Control(func(fd uintptr) { late = s.try(fd) }); e == nil && late {
			return s.err
		}
	}
	if err != nil {
		return err
	}
	return s.err
}

// free gives the buffer back.
func (s *sniffer) free() {
	if s.buf != nil {
		relayBuffers.Put(s.buf)
		s.buf, s.n = nil, 0
	}
}

func (s *sniffer) try(fd uintptr) bool {
	if s.buf == nil {
		s.buf = relayBuffers.Get().(*[relayBuffer]byte)
	}
	n, err := nowait.Peek(fd, s.buf[:])
	switch {
	case err == nowait.Again:
		if s.n == 0 {
			s.free()
		}
		return false
	case err != nil:
		s.err = err
		return true
	case n == 0:
		s.end = true
		return true
	case n > s.n:
		s.n = n
		return true
	}
	// Woken without a new byte: the end may have come behind what is there.
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && info.State == unix.BPF_TCP_CLOSE_WAIT {
		s.end = true
		return true
	}
	return false
}
