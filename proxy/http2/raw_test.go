package http2

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// raw is one end of a connection, frame by frame, for what no proper peer says.
type raw struct {
	t   testing.TB
	c   net.Conn
	in  *bufio.Reader
	enc *hpack.Encoder
	dec *hpack.Decoder
	buf bytes.Buffer
	got []Field
	out []byte
	id  uint32 // of the last stream, where a test counts
}

func newRaw(t testing.TB, c net.Conn) *raw {
	r := &raw{t: t, c: c, in: bufio.NewReaderSize(c, 64<<10)}
	r.enc = hpack.NewEncoder(&r.buf)
	r.dec = hpack.NewDecoder(4096, func(f hpack.HeaderField) { r.got = append(r.got, f) })
	return r
}

// client connects to the world and shakes hands.
func (w *world) client(settings ...setting) *raw {
	w.t.Helper()
	r := newRaw(w.t, w.dial())
	r.out = append(r.out, preface...)
	r.out = appendSettings(r.out, settings...)
	r.flush()
	return r
}

func (r *raw) flush() {
	r.t.Helper()
	if _, err := r.c.Write(r.out); err != nil {
		r.t.Fatal(err)
	}
	r.out = r.out[:0]
}

// try is flush for a peer that may have hung up.
func (r *raw) try() error {
	_, err := r.c.Write(r.out)
	r.out = r.out[:0]
	return err
}

func (r *raw) encode(fields ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.enc.WriteField(Field{Name: fields[i], Value: fields[i+1]})
	}
	return r.buf.Bytes()
}

// headers queues a head in one frame.
func (r *raw) headers(id uint32, end bool, fields ...string) {
	b := r.encode(fields...)
	flags := byte(flagEndHeaders)
	if end {
		flags |= flagEndStream
	}
	r.out = appendHeader(r.out, len(b), frameHeaders, flags, id)
	r.out = append(r.out, b...)
}

func (r *raw) get(id uint32, extra ...string) {
	r.headers(id, true, append([]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.test"}, extra...)...)
}

func (r *raw) post(id uint32, extra ...string) {
	r.headers(id, false, append([]string{":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a.test"}, extra...)...)
}

func (r *raw) data(id uint32, end bool, p []byte) {
	flags := byte(0)
	if end {
		flags = flagEndStream
	}
	r.out = appendHeader(r.out, len(p), frameData, flags, id)
	r.out = append(r.out, p...)
}

type frame struct {
	header
	payload []byte
	fields  []Field // of a head
}

func (f *frame) field(name string) string {
	for _, x := range f.fields {
		if x.Name == name {
			return x.Value
		}
	}
	return ""
}

func (f *frame) end() bool { return f.flags&flagEndStream != 0 && f.kind <= frameHeaders }

func (f *frame) code() ErrCode {
	switch f.kind {
	case frameReset:
		return ErrCode(binary.BigEndian.Uint32(f.payload))
	case frameGoaway:
		return ErrCode(binary.BigEndian.Uint32(f.payload[4:]))
	}
	return NoError
}

// next reads a frame; io.EOF is the end of the connection.
func (r *raw) next() (f frame, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r.in, h[:]); err != nil {
		return f, err
	}
	f.header = parseHeader(h[:])
	f.payload = make([]byte, f.length)
	if _, err := io.ReadFull(r.in, f.payload); err != nil {
		return f, err
	}
	if f.kind == frameHeaders {
		block, flags := f.payload, f.flags
		for flags&flagEndHeaders == 0 {
			if _, err := io.ReadFull(r.in, h[:]); err != nil {
				return f, err
			}
			c := parseHeader(h[:])
			if c.kind != frameContinuation || c.stream != f.stream {
				return f, errors.New("a header block was interrupted")
			}
			p := make([]byte, c.length)
			if _, err := io.ReadFull(r.in, p); err != nil {
				return f, err
			}
			block, flags = append(block, p...), c.flags
		}
		r.got = nil
		if _, err := r.dec.Write(block); err != nil {
			return f, err
		}
		if err := r.dec.Close(); err != nil {
			return f, err
		}
		f.fields = r.got
	}
	return f, nil
}

// await reads until a frame that match takes.
func (r *raw) await(what string, match func(f *frame) bool) frame {
	r.t.Helper()
	for {
		f, err := r.next()
		if err != nil {
			r.t.Fatalf("waited for %s: %v", what, err)
		}
		if match(&f) {
			return f
		}
	}
}

func (r *raw) awaitHead(id uint32) frame {
	r.t.Helper()
	return r.await("a head", func(f *frame) bool { return f.kind == frameHeaders && f.stream == id })
}

func (r *raw) awaitReset(id uint32) ErrCode {
	r.t.Helper()
	f := r.await("RST_STREAM", func(f *frame) bool { return f.kind == frameReset && f.stream == id })
	return f.code()
}

func (r *raw) awaitGoaway() (ErrCode, string) {
	r.t.Helper()
	f := r.await("GOAWAY", func(f *frame) bool { return f.kind == frameGoaway })
	return f.code(), string(f.payload[8:])
}

// ping shows that the connection lives and has handled what precedes.
func (r *raw) ping() {
	r.t.Helper()
	r.out = appendPing(r.out, 0, []byte("are-you?"))
	r.flush()
	r.await("PING", func(f *frame) bool { return f.kind == framePing && f.flags&flagAck != 0 })
}

// app is an application that a test plays itself.
type app struct {
	t    testing.TB
	l    net.Listener
	addr string
}

func newApp(t testing.TB) *app {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &app{t, l, l.Addr().String()}
}

// accept takes a connection and shakes hands.
func (a *app) accept(settings ...setting) *raw {
	a.t.Helper()
	a.l.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	c, err := a.l.Accept()
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	r := newRaw(a.t, c)
	b := make([]byte, len(preface))
	if _, err := io.ReadFull(r.in, b); err != nil || string(b) != preface {
		a.t.Fatalf("preface: %q, %v", b, err)
	}
	r.out = appendSettings(r.out, settings...)
	r.flush()
	return r
}

// answers starts an application that answers every stream as a gRPC server does, without
// a library: the benchmark is of the pair.
func answers(t testing.TB) string {
	a := newApp(t)
	var running sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	running.Go(func() {
		for {
			c, err := a.l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			running.Go(func() { serveRaw(c) })
		}
	})
	t.Cleanup(func() {
		a.l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return a.addr
}

var hello = []byte("\x00\x00\x00\x00\x0dhello, world!")

func serveRaw(c net.Conn) {
	defer c.Close()
	buf := make([]byte, 64<<10)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	have, greeted := 0, false
	out := appendSettings(nil, setting{settingMaxStreams, 1000})
	owed := 0
	for {
		n, err := c.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		p := buf[:have]
		if !greeted {
			if len(p) < len(preface) {
				continue
			}
			p, greeted = p[len(preface):], true
		}
		for len(p) >= frameHeader {
			h := parseHeader(p)
			if len(p) < frameHeader+h.length {
				break
			}
			switch {
			case h.kind == frameSettings && h.flags&flagAck == 0:
				out = appendHeader(out, 0, frameSettings, flagAck, 0)
			case h.kind == framePing && h.flags&flagAck == 0:
				out = appendPing(out, flagAck, p[frameHeader:])
			case h.kind <= frameHeaders && h.flags&flagEndStream != 0:
				block.Reset()
				enc.WriteField(Field{Name: ":status", Value: "200"})
				enc.WriteField(Field{Name: "content-type", Value: "application/grpc"})
				out = appendHeader(out, block.Len(), frameHeaders, flagEndHeaders, h.stream)
				out = append(out, block.Bytes()...)
				out = appendHeader(out, len(hello), frameData, 0, h.stream)
				out = append(out, hello...)
				block.Reset()
				enc.WriteField(Field{Name: "grpc-status", Value: "0"})
				enc.WriteField(Field{Name: "grpc-message", Value: ""})
				out = appendHeader(out, block.Len(), frameHeaders, flagEndHeaders|flagEndStream, h.stream)
				out = append(out, block.Bytes()...)
			}
			if h.kind == frameData {
				if owed += h.length; owed > 16<<10 {
					out = appendWindow(out, 0, owed)
					owed = 0
				}
			}
			p = p[frameHeader+h.length:]
		}
		have = copy(buf, p)
		if _, err := c.Write(out); err != nil {
			return
		}
		out = out[:0]
	}
}

// caller makes calls, depth of them at a time, on one connection.
type caller struct {
	c     net.Conn
	enc   *hpack.Encoder
	block bytes.Buffer
	buf   []byte
	have  int
	out   []byte
	id    uint32
	owed  int
}

func (w *world) caller() *caller {
	k := &caller{c: w.dial(), buf: make([]byte, 64<<10), id: 1}
	k.c.SetDeadline(time.Time{})
	k.enc = hpack.NewEncoder(&k.block)
	k.out = appendSettings(append(k.out, preface...))
	return k
}

func (k *caller) call() {
	k.block.Reset()
	for _, f := range [...]Field{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/helloworld.Greeter/SayHello"},
		{Name: ":authority", Value: "greeter.bank:50051"}, {Name: "content-type", Value: "application/grpc"}, {Name: "user-agent", Value: "grpc-go/1.85.0"}, {Name: "te", Value: "trailers"}} {
		k.enc.WriteField(f)
	}
	k.out = appendHeader(k.out, k.block.Len(), frameHeaders, flagEndHeaders, k.id)
	k.out = append(k.out, k.block.Bytes()...)
	k.out = appendHeader(k.out, len(hello), frameData, flagEndStream, k.id)
	k.out = append(k.out, hello...)
	k.id += 2
}

// run makes n calls. It returns how many were answered.
func (k *caller) run(n, depth int) (done int, err error) {
	sent := 0
	for ; sent < min(n, depth); sent++ {
		k.call()
	}
	for done < n {
		if _, err := k.c.Write(k.out); err != nil {
			return done, err
		}
		k.out = k.out[:0]
		m, err := k.c.Read(k.buf[k.have:])
		if err != nil {
			return done, err
		}
		k.have += m
		p := k.buf[:k.have]
		for len(p) >= frameHeader {
			h := parseHeader(p)
			if len(p) < frameHeader+h.length {
				break
			}
			switch {
			case h.kind == frameSettings && h.flags&flagAck == 0:
				k.out = appendHeader(k.out, 0, frameSettings, flagAck, 0)
			case h.kind == frameReset || h.kind == frameGoaway:
				return done, errors.New("a call was not answered")
			case h.kind <= frameHeaders && h.flags&flagEndStream != 0:
				if done++; sent < n {
					sent++
					k.call()
				}
			}
			if h.kind == frameData {
				if k.owed += h.length; k.owed > 16<<10 {
					k.out = appendWindow(k.out, 0, k.owed)
					k.owed = 0
				}
			}
			p = p[frameHeader+h.length:]
		}
		k.have = copy(k.buf, p)
	}
	return done, nil
}
