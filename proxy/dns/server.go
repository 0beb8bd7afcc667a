package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	maxForwards = 256     // over UDP at once; more are answered SERVFAIL
	maxMessage  = 1 << 16 // over TCP
	plainUDP    = 512     // what a client takes that says nothing (RFC 1035 section 4.2.1)
	largestUDP  = 1232    // what goes through without fragments (DNS flag day 2020)
	idleTCP     = 30 * time.Second
)

// Options are what a Server needs.
type Options struct {
	Snapshot func() *Snapshot // the current one; nil: not known yet
	Log      *slog.Logger
	// Answered, when there is one, hears which address an upstream gave for a name that
	// was asked for. It must not wait.
	Answered func(name string, addr netip.Addr, ttl time.Duration)
}

// Server answers queries on sockets that it is given.
type Server struct {
	snapshot func() *Snapshot
	log      *slog.Logger
	mark     atomic.Uint32
	slots    chan struct{}
	answered func(name string, addr netip.Addr, ttl time.Duration)
}

// NewServer makes a server.
func NewServer(o Options) *Server {
	return &Server{snapshot: o.Snapshot, log: o.Log, slots: make(chan struct{}, maxForwards), answered: o.Answered}
}

// SetMark sets the mark of the sockets that upstreams are asked through.
func (s *Server) SetMark(mark uint32) { s.mark.Store(mark) }

// ServeUDP answers what arrives on c until it is closed, or until its read deadline:
// then it answers what has arrived before.
func (s *Server) ServeUDP(ctx context.Context, c *net.UDPConn) {
	ctx, cancel := context.WithCancel(ctx)
	var forwards sync.WaitGroup
	defer forwards.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	buf := make([]byte, largestUDP*2)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				forwards.Wait() // what was asked is answered
				return
			}
			continue // an ICMP error of an answer that nobody wanted
		}
		r, msg := s.parse(buf[:n], true)
		if msg == nil && !r.forward {
			continue
		}
		if !r.forward {
			c.WriteToUDPAddrPort(msg, from)
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			c.WriteToUDPAddrPort(r.failure(dnsmessage.RCodeServerFailure), from)
			continue
		}
		r.query = append([]byte(nil), r.query...)
		forwards.Go(func() {
			defer func() { <-s.slots }()
			s.forwardUDP(ctx, c, from, r)
		})
	}
}

func (s *Server) forwardUDP(ctx context.Context, c *net.UDPConn, from netip.AddrPort, r request) {
	msg, err := s.forward(ctx, &r, false)
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		s.log.Debug("dns", "name", r.question.Name.String(), "error", err)
		msg = r.failure(dnsmessage.RCodeServerFailure)
	}
	if len(msg) > r.limit {
		msg = r.truncated()
	}
	c.WriteToUDPAddrPort(msg, from)
}

// ServeTCP answers the queries of one connection in order, and closes it.
func (s *Server) ServeTCP(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	for {
		c.SetDeadline(time.Now().Add(idleTCP))
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, query); err != nil {
			return
		}
		r, msg := s.parse(query, false)
		if r.forward {
			var err error
			if msg, err = s.forward(ctx, &r, true); err != nil {
				msg = r.failure(dnsmessage.RCodeServerFailure)
			}
		}
		if msg == nil {
			return
		}
		out := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg)))
		if _, err := c.Write(append(out, msg...)); err != nil {
			return
		}
	}
}

// request is one query.
type request struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	query    []byte
	limit    int  // what the client takes
	edns     bool // it speaks EDNS0
	forward  bool // it is for the upstreams
}

// parse reads a query and answers what can be answered here. It returns no message
// and no forward for what deserves no answer at all: it is no query.
func (s *Server) parse(p []byte, udp bool) (request, []byte) {
	r := request{query: p, limit: maxMessage - 1}
	if udp {
		r.limit = plainUDP
	}
	var parser dnsmessage.Parser
	var err error
	if r.header, err = parser.Start(p); err != nil || r.header.Response {
		return r, nil
	}
	if r.header.OpCode != 0 {
		return r, r.failure(dnsmessage.RCodeNotImplemented)
	}
	questions, err := parser.AllQuestions()
	if err != nil || len(questions) != 1 {
		return r, r.failure(dnsmessage.RCodeFormatError)
	}
	r.question = questions[0]
	if err := r.readEDNS(&parser, udp); err != nil {
		return r, r.failure(dnsmessage.RCodeFormatError)
	}
	snap := s.snapshot()
	if snap == nil {
		return r, r.failure(dnsmessage.RCodeServerFailure)
	}
	a := snap.lookup(r.question)
	if !a.ours {
		r.forward = len(snap.upstreams) > 0
		if r.forward {
			return r, nil
		}
		return r, r.failure(dnsmessage.RCodeServerFailure)
	}
	msg := r.reply(a.rcode, a.records, false)
	if len(msg) > r.limit {
		msg = r.truncated()
	}
	return r, msg
}

// readEDNS looks for the OPT record (RFC 6891).
func (r *request) readEDNS(parser *dnsmessage.Parser, udp bool) error {
	if err := parser.SkipAllAnswers(); err != nil {
		return err
	}
	if err := parser.SkipAllAuthorities(); err != nil {
		return err
	}
	for {
		h, err := parser.AdditionalHeader()
		if err == dnsmessage.ErrSectionDone {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Type == dnsmessage.TypeOPT {
			r.edns = true
			if udp {
				r.limit = min(max(int(h.Class), plainUDP), largestUDP)
			}
		}
		if err := parser.SkipAdditional(); err != nil {
			return err
		}
	}
}

func (r *request) failure(code dnsmessage.RCode) []byte { return r.reply(code, nil, false) }

func (r *request) truncated() []byte { return r.reply(dnsmessage.RCodeSuccess, nil, true) }

// reply packs an answer to r.
func (r *request) reply(code dnsmessage.RCode, records []dnsmessage.Resource, truncated bool) []byte {
	m := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: r.header.ID, Response: true, OpCode: r.header.OpCode, Authoritative: code != dnsmessage.RCodeServerFailure,
			Truncated: truncated, RecursionDesired: r.header.RecursionDesired, RecursionAvailable: true, RCode: code,
		},
		Answers: records,
	}
	if r.question.Name.Length > 0 {
		m.Questions = []dnsmessage.Question{r.question}
	}
	if r.edns {
		var h dnsmessage.ResourceHeader
		if h.SetEDNS0(largestUDP, code, false) == nil {
			m.Additionals = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
		}
	}
	msg, err := m.Pack()
	if err != nil {
		return nil // a name that cannot be packed again: no answer
	}
	return msg
}
