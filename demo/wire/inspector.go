package wire

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// Inspector puts packets together and judges them. Its methods may be called by any
// goroutine. Memory is bounded by the number of connections, not by their bytes.
type Inspector struct {
	mu      sync.Mutex
	texts   [][]byte
	live    map[[2]netip.AddrPort]*conn // by client and server
	ended   []*conn                     // whose ports were used again
	other   map[string]bool             // texts in packets that belong to no connection
	packets uint64
	missed  uint64
	cut     uint64
}

// conn is one TCP connection.
type conn struct {
	client, server netip.AddrPort
	up, down       stream // from the client, from the server
	reset          bool
	found          map[string]bool
}

// NewInspector searches for texts besides telling TLS from everything else. A packet
// may be given to it as often as it crosses a link.
func NewInspector(texts ...string) *Inspector {
	in := &Inspector{live: map[[2]netip.AddrPort]*conn{}, other: map[string]bool{}}
	for _, t := range texts {
		in.texts = append(in.texts, []byte(t))
	}
	return in
}

// Packet takes one packet, from its IP header on. cut says that it is not whole.
func (in *Inspector) Packet(p []byte, cut bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.packets++
	if cut {
		in.cut++
	}
	s, ok := parse(p)
	if !ok || s.proto != protoTCP {
		for _, t := range in.texts {
			if bytes.Contains(p, t) {
				in.other[string(t)] = true
			}
		}
		return
	}
	c, st := in.direction(&s)
	if s.flags&flagRST != 0 {
		c.reset = true
	}
	st.segment(&s, in.texts, func(i int) { c.found[string(in.texts[i])] = true })
}

// Missed counts packets that the kernel could not hand over.
func (in *Inspector) Missed(n uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.missed += n
}

// direction finds the connection of a segment and which way it goes. Whoever sends a
// SYN without ACK is the client; when none was seen, whoever is seen first.
func (in *Inspector) direction(s *segment) (*conn, *stream) {
	key, back := [2]netip.AddrPort{s.src, s.dst}, [2]netip.AddrPort{s.dst, s.src}
	opens := s.flags&(flagSYN|flagACK) == flagSYN
	if c := in.live[key]; c != nil {
		if !opens || !c.up.started || c.up.first == s.seq+1 {
			return c, &c.up
		}
		in.ended = append(in.ended, c) // the same ports, another connection
		delete(in.live, key)
	} else if c := in.live[back]; c != nil && !opens {
		return c, &c.down
	}
	if s.flags&(flagSYN|flagACK) == flagSYN|flagACK {
		c := &conn{client: s.dst, server: s.src, found: map[string]bool{}}
		in.live[back] = c
		return c, &c.down
	}
	c := &conn{client: s.src, server: s.dst, found: map[string]bool{}}
	in.live[key] = c
	return c, &c.up
}

// Conn is what was seen of one TCP connection.
type Conn struct {
	Client     netip.AddrPort `json:"client"`
	Server     netip.AddrPort `json:"server"`
	Up         Direction      `json:"up"`             // from the client
	Down       Direction      `json:"down"`           // from the server
	Reset      bool           `json:"reset"`          // somebody sent RST
	Found      []string       `json:"found"`          // texts that were there in clear
	Hello      Hello          `json:"hello,omitzero"` // of the client
	Version    uint16         `json:"version"`        // of TLS, that the server chose; 0: no TLS
	Incomplete bool           `json:"incomplete"`     // some bytes were not seen
}

// Direction is one half of a connection.
type Direction struct {
	Bytes       uint64 `json:"bytes"`
	Speaks      string `json:"speaks"`      // "tls", "http/1", "http/2", "nats", "other"; "" when silent
	Application uint64 `json:"application"` // TLS records with application data
}

// TLS reports whether each byte of both directions was in a TLS record and both sides
// sent application data: a handshake alone proves no traffic.
func (c *Conn) TLS() bool {
	return c.Up.Speaks == "tls" && c.Down.Speaks == "tls" && c.Up.Application > 0 && c.Down.Application > 0
}

// Clear says what somebody on the wire can read of the connection's content, "" for
// nothing.
func (c *Conn) Clear() string {
	var why []string
	if len(c.Found) > 0 {
		why = append(why, "payload with "+strings.Join(c.Found, ", "))
	}
	for _, d := range []struct {
		who string
		Direction
	}{{"client", c.Up}, {"server", c.Down}} {
		if d.Bytes > 0 && d.Speaks != "tls" {
			why = append(why, fmt.Sprintf("%s speaks %s", d.who, d.Speaks))
		}
	}
	return strings.Join(why, ", ")
}

// Report is everything that was seen.
type Report struct {
	Packets uint64   `json:"packets"`
	Missed  uint64   `json:"missed"` // packets that the kernel dropped before we saw them
	Cut     uint64   `json:"cut"`    // packets that were not whole
	Conns   []Conn   `json:"conns"`  // by client and server
	Other   []string `json:"other"`  // texts in packets that are not TCP
}

// Report judges what was seen so far.
func (in *Inspector) Report() Report {
	in.mu.Lock()
	defer in.mu.Unlock()
	r := Report{Packets: in.packets, Missed: in.missed, Cut: in.cut, Other: slices.Sorted(maps.Keys(in.other))}
	for _, c := range slices.Concat(in.ended, slices.Collect(maps.Values(in.live))) {
		found := func(i int) { c.found[string(in.texts[i])] = true }
		c.up.finish(in.texts, found)
		c.down.finish(in.texts, found)
		one := Conn{
			Client: c.client, Server: c.server, Reset: c.reset,
			Up: c.up.direction(), Down: c.down.direction(),
			Found:      slices.Sorted(maps.Keys(c.found)),
			Incomplete: c.up.holes+c.down.holes > 0,
		}
		if h := c.up.records.Hello; h.Seen && h.Client {
			one.Hello = h
		}
		if h := c.down.records.Hello; h.Seen && !h.Client && len(h.Versions) == 1 {
			one.Version = h.Versions[0]
		}
		r.Conns = append(r.Conns, one)
	}
	slices.SortFunc(r.Conns, func(a, b Conn) int {
		return cmp.Or(a.Client.Compare(b.Client), a.Server.Compare(b.Server))
	})
	return r
}

func (st *stream) direction() Direction {
	d := Direction{Bytes: st.bytes, Application: st.records.count(recordApplication)}
	switch {
	case st.bytes == 0:
	case st.records.tls():
		d.Speaks = "tls"
	default:
		d.Speaks = speaks(st.head)
	}
	return d
}

// preambles are the first bytes of protocols in clear, either side's.
var preambles = []struct{ protocol, begins string }{
	{"http/2", "PRI * HTTP/2.0"},
	{"http/1", "HTTP/1."},
	{"nats", "INFO {"},
	{"nats", "CONNECT {"},
	{"ssh", "SSH-"},
	{"http/1", "GET "}, {"http/1", "POST "}, {"http/1", "PUT "}, {"http/1", "HEAD "}, {"http/1", "DELETE "},
	{"http/1", "PATCH "}, {"http/1", "OPTIONS "}, {"http/1", "CONNECT "},
}

func speaks(head []byte) string {
	for _, p := range preambles {
		if strings.HasPrefix(string(head), p.begins) {
			return p.protocol
		}
	}
	// HTTP/2 from a server begins with a SETTINGS frame on stream 0 (RFC 9113 section 3.4).
	if len(head) >= 9 && head[0] == 0 && head[1] == 0 && head[3] == 4 && string(head[5:9]) == "\x00\x00\x00\x00" {
		return "http/2"
	}
	return "other"
}
