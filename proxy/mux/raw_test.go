package mux

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"assay.dev/proxy/pairtest"
)

// raw is a peer made by hand: it says what the test wants and keeps what it hears.
type raw struct {
	net.Conn
	heard chan []byte // everything, once the connection has ended
}

func newRaw(conn net.Conn) *raw {
	r := &raw{conn, make(chan []byte, 1)}
	go func() {
		b, _ := io.ReadAll(conn)
		r.heard <- b
	}()
	return r
}

func greeting() []byte {
	cfg := Config{}.withDefaults()
	return appendPreface(nil, &cfg)
}

func frames(list ...[]byte) (b []byte) {
	for _, f := range list {
		b = append(b, f...)
	}
	return b
}

func data(id uint32, p string, flags byte) []byte {
	return append(appendHeader(nil, frameData, flags, len(p), id), p...)
}

// TestViolations sends what no honest peer sends. Each ends the session with the
// name of the rule, in the error and in the last word to the peer.
func TestViolations(t *testing.T) {
	open := func(id uint32, flags byte) []byte { return appendOpen(nil, flags, id, []byte("o"), nil) }
	raise := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	setting := func(list ...any) []byte {
		p := binary.BigEndian.AppendUint16(nil, uint16(list[0].(int)))
		for i := 1; i < len(list); i += 2 {
			p = appendSetting(p, uint16(list[i].(int)), list[i+1].(int))
		}
		return append([]byte(preface), append(appendHeader(nil, frameSettings, 0, len(p), 0), p...)...)
	}
	hi := greeting
	full := make([]byte, maxPayload)
	for name, tc := range map[string]struct {
		say  []byte
		rule string
	}{
		"no preface":              {[]byte("GET / HTTP/1.1\r\n"), "preface"},
		"other version":           {setting(2), "version"},
		"odd settings":            {append([]byte(preface), appendHeader(nil, frameSettings, 0, 5, 0)...), ""},
		"settings cut":            {append([]byte(preface), append(appendHeader(nil, frameSettings, 0, 3, 0), 0, 1, 0)...), "settings-length"},
		"settings unordered":      {setting(1, 2, 5, 1, 20000), "settings-order"},
		"settings twice the same": {setting(1, 2, 5, 2, 5), "settings-order"},
		"small window":            {setting(1, 1, 100), "settings-window"},
		"huge window":             {setting(1, 1, 1<<30), "settings-window"},
		"no streams":              {setting(1, 2, 0), "settings-max-streams"},
		"small opens":             {setting(1, 3, 10), "settings-max-open"},
		"settings again":          {frames(hi(), hi()[len(preface):]), "settings-first"},
		"open first":              {append([]byte(preface), open(1, 0)...), "settings-first"},
		"type 0":                  {frames(hi(), appendHeader(nil, 0, 0, 0, 0)), "frame-type"},
		"type 10":                 {frames(hi(), appendHeader(nil, 10, 0, 0, 0)), "frame-type"},
		"unknown flag":            {frames(hi(), appendOpen(nil, 2, 1, nil, nil)), "frame-flags"},
		"fin on reset":            {frames(hi(), open(1, 0), raise(appendReset(nil, 1, Cancelled), 0, flagFin<<4|frameReset)), "frame-flags"},
		"oversized frame":         {frames(hi(), appendHeader(nil, frameData, 0, maxPayload+1, 1)), "frame-form"},
		"data on stream 0":        {frames(hi(), data(0, "x", 0)), "frame-form"},
		"empty data":              {frames(hi(), open(1, 0), data(1, "", 0)), "frame-form"},
		"long reset":              {frames(hi(), appendHeader(nil, frameReset, 0, 3, 1)), "frame-form"},
		"ping on a stream":        {frames(hi(), raise(appendPing(nil, framePing, 0), 7, 1)), "frame-form"},
		"shut with words":         {frames(hi(), open(1, 0), append(appendHeader(nil, frameShut, 0, 1, 1), 'x')), "frame-form"},
		"shut before open":        {frames(hi(), appendShut(nil, 1)), "shut-before-open"},
		"shut twice":              {frames(hi(), open(1, 0), appendShut(nil, 1), appendShut(nil, 1)), "shut-twice"},
		"long goodbye":            {frames(hi(), appendHeader(nil, frameGoaway, 0, 4+maxGoodbye+1, 0)), "frame-form"},
		"open of our numbers":     {frames(hi(), open(2, 0)), "open-order"},
		"open skips":              {frames(hi(), open(3, 0)), "open-order"},
		"open again":              {frames(hi(), open(1, 0), open(1, 0)), "open-order"},
		"open payload cut":        {frames(hi(), append(appendHeader(nil, frameOpen, 0, 3, 1), 0, 2, 'x')), "open-length"},
		"open payload long":       {frames(hi(), appendOpen(nil, 0, 1, full[:9<<10], nil)), "open-too-long"},
		"data before open":        {frames(hi(), data(1, "x", 0)), "data-before-open"},
		"data on our unopened":    {frames(hi(), data(2, "x", 0)), "data-before-open"},
		"data after fin":          {frames(hi(), open(1, flagFin), data(1, "x", 0)), "data-after-end"},
		"fin twice":               {frames(hi(), open(1, 0), data(1, "x", flagFin), data(1, "", flagFin)), "data-after-end"},
		"data after reset":        {frames(hi(), open(1, 0), appendReset(nil, 1, Cancelled), data(1, "x", 0)), "data-after-end"},
		"reset before open":       {frames(hi(), appendReset(nil, 1, Cancelled)), "reset-before-open"},
		"reset without code":      {frames(hi(), open(1, 0), appendReset(nil, 1, 0)), "reset-code"},
		"credit before open":      {frames(hi(), appendCredit(nil, 1, minCredit)), "credit-before-open"},
		"crumbs of credit":        {frames(hi(), open(1, 0), appendCredit(nil, 1, minCredit-1)), "credit-small"},
		"too much credit":         {frames(hi(), open(1, 0), appendCredit(nil, 1, maxWindow)), "credit-overflow"},
		"huge credit":             {frames(hi(), open(1, 0), appendCredit(nil, 1, 1<<32-1)), "credit-overflow"},
		"over its credit":         {frames(hi(), open(1, 0), data(1, string(full), 0), data(1, string(full), 0)), "credit-exceeded"},
		"unasked pong":            {frames(hi(), appendPing(nil, framePong, 1)), "pong-unasked"},
		"goodbye of nothing":      {frames(hi(), appendGoaway(nil, 0, 2, "")), "goaway-last"},
		"goodbye twice":           {frames(hi(), open(1, 0), appendGoaway(nil, 0, 0, ""), appendGoaway(nil, 0, 0, "")), "goaway-twice"},
		"open after goodbye":      {frames(hi(), open(1, 0), appendGoaway(nil, 0, 0, ""), open(3, 0)), "open-after-goaway"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pairtest.TCP(t)
			s := New(NewSocket(b), false, Config{Window: 16 << 10}, func(Stream, []byte) (Handler, Code) {
				h := newCall()
				h.hold = true
				return h, 0
			})
			peer := newRaw(a)
			if _, err := peer.Write(tc.say); err != nil {
				t.Fatal(err)
			}
			peer.Conn.(*net.TCPConn).CloseWrite()
			err := s.Run()
			heard := <-peer.heard
			if tc.rule == "" { // a frame that never became whole
				if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonPeerClosed {
					t.Fatal(err)
				}
				return
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Reason != ReasonProtocol || e.Detail != tc.rule {
				t.Fatalf("got %v, want %s", err, tc.rule)
			}
			if !strings.HasSuffix(string(heard), tc.rule) {
				t.Errorf("the last word was %q", heard)
			}
		})
	}
}

// TestFloods sends valid frames that only cost.
func TestFloods(t *testing.T) {
	for name, tc := range map[string]struct {
		detail string
		next   func(n uint32) []byte
	}{
		"pings": {"pings", func(n uint32) []byte { return appendPing(nil, framePing, uint64(n)) }},
		"rapid reset": {"resets", func(n uint32) []byte {
			return frames(appendOpen(nil, 0, 2*n+1, []byte("x"), nil), appendReset(nil, 2*n+1, Cancelled))
		}},
		"opens over the limit": {"resets", func(n uint32) []byte { return appendOpen(nil, flagFin, 2*n+1, []byte("x"), nil) }},
		"never lets go":        {"zombies", nil},
		"stale credit":         {"stale-credit", nil},
		"stale shut":           {"stale-credit", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.next == nil {
				tc.next = func(n uint32) []byte {
					if name == "never lets go" {
						return appendOpen(nil, 0, 2*n+1, []byte("refuse"), nil)
					}
					if n == 0 {
						return frames(appendOpen(nil, 0, 1, []byte("x"), nil), appendReset(nil, 1, Cancelled))
					}
					if name == "stale shut" {
						return appendShut(nil, 1)
					}
					return appendCredit(nil, 1, minCredit)
				}
			}
			a, b := pairtest.TCP(t)
			s := New(NewSocket(b), false, Config{MaxStreams: 1}, func(st Stream, open []byte) (Handler, Code) {
				if string(open) == "refuse" {
					st.Reset(Denied) // by the application: not counted as refused
					return nil, 0
				}
				return newCall(), 0
			})
			end := make(chan error, 1)
			go func() { end <- s.Run() }()
			peer := newRaw(a)
			peer.Write(greeting())
			for n := uint32(0); ; n++ {
				if _, err := peer.Write(tc.next(n)); err != nil || n > 1_000_000 {
					break
				}
				if len(end) > 0 {
					break
				}
			}
			err := <-end
			a.Close()
			<-peer.heard
			if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonFlood || e.Detail != tc.detail {
				t.Fatal(err)
			}
		})
	}
}

// TestLastWord: what the peer never looked at may be tried elsewhere.
func TestLastWord(t *testing.T) {
	a, b := pairtest.TCP(t)
	s := New(NewSocket(a), true, Config{}, nil)
	var h [2]*call
	for i := range h {
		h[i] = newCall()
		if _, _, err := s.Open([]byte("x"), nil, true, h[i]); err != nil {
			t.Fatal(err)
		}
	}
	peer := newRaw(b)
	peer.Write(frames(greeting(), appendGoaway(nil, flagFin, 1, "out of\x1b[31m order")))
	err := s.Run()
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonPeerClosed || e.Detail != "out of?[31m order" {
		t.Error(err)
	}
	<-peer.heard
	if h[0].reset != Broken || h[1].reset != Refused {
		t.Errorf("looked at: %v, not looked at: %v", h[0].reset, h[1].reset)
	}
}

func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		peer := newRaw(b)
		s := New(a, true, Config{}, nil)
		go peer.Write(greeting())
		begin := time.Now()
		err := s.Run()
		if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonTimeout {
			t.Error(err)
		}
		if d := time.Since(begin); d != 15*time.Second {
			t.Errorf("ended after %v", d)
		}
		if heard := <-peer.heard; heard[len(greeting())] != framePing {
			t.Errorf("heard %q", heard)
		}
	})
}

// TestPeerThatDoesNotRead: it keeps sending, so it is not silent, but takes nothing.
func TestPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		s := New(a, true, Config{}, nil)
		go func() {
			b.Write(greeting())
			for n := uint32(0); ; n++ {
				// Opens are refused; the refusals cannot be written.
				if _, err := b.Write(appendOpen(nil, flagFin, 2*n+2, nil, nil)); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		begin := time.Now()
		err := s.Run()
		if e, ok := errors.AsType[*Error](err); !ok || e.Reason != ReasonTimeout {
			t.Error(err)
		}
		if d := time.Since(begin); d > 2*time.Minute {
			t.Errorf("ended after %v", d)
		}
		b.Close()
	})
}

func TestIdleSessionLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		p := start(t, a, b, Config{}, Config{}, echo, nil)
		time.Sleep(time.Hour)
		h := newCall()
		if _, _, err := p.client.Open(nil, []byte("still there?"), true, h); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if string(h.got) != "still there?" {
			t.Errorf("got %q", h.got)
		}
		p.client.mu.Lock()
		if n := cap(p.client.out) + cap(p.client.spare); n > 2<<10 {
			t.Errorf("an idle session keeps %d bytes of buffers", n)
		}
		p.client.mu.Unlock()
		p.client.Close(nil)
		p.server.Close(nil)
		p.wg.Wait()
	})
}
