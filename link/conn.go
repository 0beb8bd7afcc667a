package link

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxInline is the largest packet; a longer one travels in a memfd.
const MaxInline = 32 << 10

// maxFiles bounds the descriptors of one message.
const maxFiles = 8

// maxBody bounds a body: a snapshot of thousands of services fits.
const maxBody = 64 << 20

// Conn is one end of a link. Send may be called by several goroutines, Receive by
// one at a time.
type Conn struct {
	unix *net.UnixConn
	mu   sync.Mutex // keeps one sender's packets in order
	buf  []byte     // of the receiver
	oob  []byte
	most int64 // bytes of a body in a memfd; the receiver's
}

type envelope struct {
	Kind  Kind            `json:"kind"`
	ID    uint64          `json:"id,omitempty"`
	Large bool            `json:"large,omitempty"` // the body is in the last descriptor
	Body  json.RawMessage `json:"body,omitempty"`
}

// NewConn takes over a connected SOCK_SEQPACKET socket.
func NewConn(c *net.UnixConn) *Conn {
	return &Conn{unix: c, buf: make([]byte, MaxInline+1024), oob: make([]byte, unix.CmsgSpace(4*(maxFiles+1))), most: maxBody}
}

// Limit bounds the bodies that Receive takes out of a memfd; 0 takes none. A body is
// copied before anybody looks at it, so whoever reads from a peer that it does not
// trust says how much that may be. It belongs to the one who calls Receive.
func (c *Conn) Limit(n int64) { c.most = min(n, maxBody) }

// Pair makes a connected pair: one end as a Conn, the other as a file to give to
// a child, which FileConn turns into a Conn there.
func Pair() (*Conn, *os.File, error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("link: socket pair: %w", err)
	}
	near, far := os.NewFile(uintptr(fd[0]), "link"), os.NewFile(uintptr(fd[1]), "link-peer")
	c, err := FileConn(near)
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return c, far, nil
}

// FileConn turns an inherited socket into a Conn and closes f.
func FileConn(f *os.File) (*Conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("link: descriptor %d is not a socket: %w", f.Fd(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("link: descriptor is a %s socket, want unix", c.LocalAddr().Network())
	}
	return NewConn(u), nil
}

// Dial connects to the agent's socket at path.
func Dial(path string) (*Conn, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	return NewConn(c), nil
}

// Socket returns the underlying socket, for its peer's credentials.
func (c *Conn) Socket() *net.UnixConn { return c.unix }

// Close closes this end; the peer's Receive returns io.EOF.
func (c *Conn) Close() error { return c.unix.Close() }

// Send sends one message: body (nil for none) as JSON, or as it is Encoded, and copies of
// files, which stay the caller's.
func (c *Conn) Send(kind Kind, id uint64, body any, files ...int) error {
	if len(files) > maxFiles {
		return fmt.Errorf("link: %s: %d descriptors, at most %d", kind, len(files), maxFiles)
	}
	e, done, err := encoded(body)
	if err != nil {
		return fmt.Errorf("link: %s: %w", kind, err)
	}
	defer done()
	packet, rights := e.packet(kind, id), e.rights(files)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, _, err := c.unix.WriteMsgUnix(packet, rights, nil); err != nil {
		return fmt.Errorf("link: send %s: %w", kind, err)
	}
	runtime.KeepAlive(e)
	return nil
}

// Receive waits for the next message. It returns io.EOF when the peer is gone.
// The body is the caller's; so are the descriptors, also with an error.
func (c *Conn) Receive() (Message, error) {
	n, oobn, flags, _, err := c.unix.ReadMsgUnix(c.buf, c.oob)
	if errors.Is(err, unix.ECONNRESET) {
		// A peer that closed with unread packets of ours: the kernel says so once, before
		// it hands over what the peer sent last.
		n, oobn, flags, _, err = c.unix.ReadMsgUnix(c.buf, c.oob)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return Message{}, io.EOF
	}
	if err != nil {
		return Message{}, fmt.Errorf("link: receive: %w", err)
	}
	m := Message{}
	if m.Files, err = parseRights(c.oob[:oobn]); err != nil {
		return m, err
	}
	if n == 0 && oobn == 0 {
		return m, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeAll(m.Files)
		return Message{}, errors.New("link: packet or descriptors cut short")
	}
	var env envelope
	if err := json.Unmarshal(c.buf[:n], &env); err != nil {
		closeAll(m.Files)
		return Message{}, fmt.Errorf("link: packet of %d bytes: %w", n, err)
	}
	m.Kind, m.ID, m.Body = env.Kind, env.ID, env.Body
	if env.Large {
		if len(m.Files) == 0 {
			return Message{}, fmt.Errorf("link: %s: body announced but not attached", env.Kind)
		}
		last := m.Files[len(m.Files)-1]
		m.Files = m.Files[:len(m.Files)-1]
		m.Body, err = readAll(last, c.most)
		unix.Close(last)
		if err != nil {
			closeAll(m.Files)
			return Message{}, fmt.Errorf("link: %s: body: %w", env.Kind, err)
		}
	}
	return m, nil
}

// Decode reads the message's body into v.
func (m *Message) Decode(v any) error {
	if err := json.Unmarshal(m.Body, v); err != nil {
		return fmt.Errorf("link: %s: %w", m.Kind, err)
	}
	return nil
}

// Take returns the message's descriptors, which are the caller's from now on: Discard
// leaves them alone, also that of a copy of the message.
func (m *Message) Take() []int {
	files := slices.Clone(m.Files)
	for i := range m.Files {
		m.Files[i] = -1
	}
	m.Files = nil
	return files
}

// Discard closes the message's descriptors, but for those that were taken.
func (m *Message) Discard() { closeAll(m.Take()) }
