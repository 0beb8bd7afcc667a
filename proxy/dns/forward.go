package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// upstreamTimeout is for one attempt at one upstream: less than the five seconds
// that C libraries wait, so that a second upstream is asked in time.
const upstreamTimeout = 2 * time.Second

var errNoUpstream = errors.New("no upstream answered")

// forward asks the upstreams in order, over UDP and again over TCP when the answer
// was cut short, or over TCP at once.
func (s *Server) forward(ctx context.Context, r *request, tcp bool) ([]byte, error) {
	err := errNoUpstream
	for _, up := range s.snapshot().upstreams {
		var msg []byte
		var e error
		if !tcp {
			msg, e = s.ask(ctx, "udp", up, r)
			if e == nil && msg[2]&0x02 != 0 { // TC
				if full, e := s.ask(ctx, "tcp", up, r); e == nil {
					msg = full
				}
			}
		} else {
			msg, e = s.ask(ctx, "tcp", up, r)
		}
		if e == nil {
			binary.BigEndian.PutUint16(msg, r.header.ID)
			if s.answered != nil {
				given(msg, s.answered)
			}
			return msg, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		err = fmt.Errorf("upstream %s: %w", up, e)
	}
	return nil, err
}

// ask sends r under a random ID from a port that the kernel chooses, and waits for
// an answer with that ID to that question.
func (s *Server) ask(ctx context.Context, network string, up netip.AddrPort, r *request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	mark := int(s.mark.Load())
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) {
			if mark != 0 {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)
			}
		}); e != nil {
			return e
		}
		return err
	}}
	c, err := d.DialContext(ctx, network, up.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)

	id := uint16(rand.Uint32())
	query := append(make([]byte, 0, len(r.query)+2), r.query...)
	binary.BigEndian.PutUint16(query, id)
	if network == "tcp" {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	for {
		var msg []byte
		if network == "tcp" {
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return nil, err
			}
			msg = make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(c, msg); err != nil {
				return nil, err
			}
		} else {
			n, err := c.Read(buf)
			if err != nil {
				return nil, err
			}
			msg = buf[:n]
		}
		if answers(msg, id, r.question) {
			return msg, nil
		}
		if network == "tcp" {
			return nil, errors.New("answered something else")
		}
	}
}

// answers reports whether msg is the answer that was waited for.
func answers(msg []byte, id uint16, q dnsmessage.Question) bool {
	var parser dnsmessage.Parser
	h, err := parser.Start(msg)
	if err != nil || h.ID != id || !h.Response {
		return false
	}
	got, err := parser.Question()
	if err == dnsmessage.ErrSectionDone {
		return h.RCode != dnsmessage.RCodeSuccess // some refuse without repeating the question
	}
	return err == nil && got.Type == q.Type && got.Class == q.Class && strings.EqualFold(got.Name.String(), q.Name.String())
}

// given tells of each address that an answer gives to the name that was asked for, by
// way of aliases too (RFC 1034 section 3.6.2), with the shortest TTL on the way.
func given(msg []byte, tell func(name string, addr netip.Addr, ttl time.Duration)) {
	var parser dnsmessage.Parser
	h, err := parser.Start(msg)
	if err != nil || h.RCode != dnsmessage.RCodeSuccess {
		return
	}
	q, err := parser.Question()
	if err != nil || q.Class != dnsmessage.ClassINET || q.Type != dnsmessage.TypeA && q.Type != dnsmessage.TypeAAAA || parser.SkipAllQuestions() != nil {
		return
	}
	name, asked := q.Name.String(), q.Name.String()
	ttl := uint32(1<<31 - 1)
	for range maxAnswers {
		h, err := parser.AnswerHeader()
		if err != nil {
			return
		}
		ours := strings.EqualFold(h.Name.String(), name) && h.Class == dnsmessage.ClassINET
		switch {
		case ours && h.Type == dnsmessage.TypeCNAME:
			r, err := parser.CNAMEResource()
			if err != nil {
				return
			}
			name, ttl = r.CNAME.String(), min(ttl, h.TTL)
		case ours && h.Type == dnsmessage.TypeA:
			r, err := parser.AResource()
			if err != nil {
				return
			}
			tell(asked, netip.AddrFrom4(r.A), time.Duration(min(ttl, h.TTL))*time.Second)
		case ours && h.Type == dnsmessage.TypeAAAA:
			r, err := parser.AAAAResource()
			if err != nil {
				return
			}
			tell(asked, netip.AddrFrom16(r.AAAA).Unmap(), time.Duration(min(ttl, h.TTL))*time.Second)
		default:
			if parser.SkipAnswer() != nil {
				return
			}
		}
	}
}

// Resolve asks the upstreams for a name's addresses of one family; what they say,
// Options.Answered hears.
func (s *Server) Resolve(ctx context.Context, name string, ipv6 bool) error {
	if s.snapshot() == nil {
		return errNoUpstream
	}
	n, err := dnsmessage.NewName(strings.TrimSuffix(name, ".") + ".")
	if err != nil {
		return err
	}
	q := dnsmessage.Question{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	if ipv6 {
		q.Type = dnsmessage.TypeAAAA
	}
	m := dnsmessage.Message{Header: dnsmessage.Header{RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	query, err := m.Pack()
	if err != nil {
		return err
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	_, err = s.forward(ctx, &request{question: q, query: query, limit: plainUDP}, false)
	return err
}
