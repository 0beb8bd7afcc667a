package http2

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/http"
	"testing"
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// TestResets passes RST_STREAM with its code, both ways.
func TestResets(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	var s *raw
	id := uint32(1)
	for _, code := range []ErrCode{Cancel, InternalError, NoError, ProtocolError, EnhanceYourCalm, RefusedStream, ErrCode(200), ErrCode(1 << 20)} {
		want := code
		if code > 0xff {
			want = InternalError
		}
		r.post(id)
		r.flush()
		if s == nil {
			s = a.accept()
		}
		s.awaitHead(id)
		r.out = appendReset(r.out, id, code)
		r.flush()
		wantApp := want
		if code == RefusedStream {
			wantApp = Cancel
		}
		if got := s.awaitReset(id); got != wantApp {
			t.Errorf("client's %d reached the application as %d", code, got)
		}
		id += 2
		if code == RefusedStream { // it is tried again: another test
			continue
		}
		r.post(id)
		r.flush()
		s.awaitHead(id)
		s.headers(id, false, ":status", "200")
		s.out = appendReset(s.out, id, code)
		s.flush()
		if got := r.awaitReset(id); got != want {
			t.Errorf("application's %d reached the client as %d", code, got)
		}
		id += 2
	}
	r.ping()
	s.ping()
}

// TestRefusedIsRetried: what nobody has read goes elsewhere, and what somebody has not.
func TestRefusedIsRetried(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	w := newWorld(t, app)
	for _, code := range []mux.Code{mux.Refused, mux.Overloaded, mux.Unreachable} {
		w.mu.Lock()
		w.refuse = []mux.Code{code, code}
		w.mu.Unlock()
		r := w.client()
		r.post(1)
		r.data(1, true, []byte("again"))
		r.flush()
		if f := r.awaitHead(1); f.field(":status") != "200" {
			t.Errorf("%v: %v", code, f.fields)
		}
		f := r.await("the body", func(f *frame) bool { return f.kind == frameData })
		if string(f.payload) != "again" {
			t.Errorf("%q", f.payload)
		}
		w.mu.Lock()
		w.refuse = []mux.Code{code, code, code, code}
		w.mu.Unlock()
		r.post(3, "content-type", "application/grpc")
		r.data(3, true, []byte("\x00\x00\x00\x00\x00"))
		r.flush()
		if f := r.awaitHead(3); f.field("grpc-status") != "14" || f.field("grpc-message") == "" || !f.end() {
			t.Errorf("%v: %v", code, f.fields)
		}
		r.c.Close()
		w.mu.Lock()
		w.refuse = nil
		w.mu.Unlock()
	}
	w.mu.Lock()
	w.refuse = []mux.Code{mux.Denied}
	w.mu.Unlock()
	r := w.client()
	r.get(1)
	r.flush()
	if f := r.awaitHead(1); f.field(":status") != "403" || f.field("assay-error") != "denied" {
		t.Errorf("%v", f.fields)
	}
}

// TestRefusedByApplication: REFUSED_STREAM, and GOAWAY with a lower last stream, say that
// a request was not read.
func TestRefusedByApplication(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.post(1)
	r.data(1, true, []byte("x"))
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	s.out = appendReset(s.out, 1, RefusedStream)
	s.flush()
	s.awaitHead(3)
	s.out = appendGoaway(s.out, 1, NoError, "")
	s.flush()
	s2 := a.accept()
	s2.awaitHead(1)
	s2.headers(1, true, ":status", "204")
	s2.flush()
	if f := r.awaitHead(1); f.field(":status") != "204" || !f.end() {
		t.Errorf("%v", f.fields)
	}
	if x := w.clients.wait(t, 1)[0]; x.Attempt != 2 || x.Failure != "" {
		t.Errorf("%+v", x)
	}
	if _, err := s.next(); err == nil {
		for err == nil {
			_, err = s.next()
		}
	}
}

// TestGoawayLetsStreamsEnd: what runs when the application says goodbye runs on, and new
// streams go over a new connection.
func TestGoawayLetsStreamsEnd(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.post(1)
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	s.out = appendGoaway(s.out, 1, NoError, "")
	s.flush()
	s.ping()
	r.get(3)
	r.flush()
	s2 := a.accept()
	s2.awaitHead(1)
	s2.headers(1, true, ":status", "200")
	s2.flush()
	r.awaitHead(3)
	r.data(1, true, []byte("late"))
	r.flush()
	s.await("the end", func(f *frame) bool { return f.kind == frameData && f.end() })
	s.headers(1, true, ":status", "201")
	s.flush()
	if f := r.awaitHead(1); f.field(":status") != "201" {
		t.Errorf("%v", f.fields)
	}
}

// TestEarlyResponse: a complete response before the end of the request, and NO_ERROR that
// asks for no more, reach the client in this order.
func TestEarlyResponse(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client(setting{settingWindow, 5})
	r.post(1)
	r.data(1, false, []byte("begin"))
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	s.headers(1, false, ":status", "413")
	s.data(1, true, []byte("too long"))
	s.out = appendReset(s.out, 1, NoError)
	s.flush()
	if f := r.awaitHead(1); f.field(":status") != "413" {
		t.Fatalf("%v", f.fields)
	}
	r.await("a part", func(f *frame) bool { return f.kind == frameData && string(f.payload) == "too l" })
	r.out = appendWindow(r.out, 1, 100)
	r.flush()
	r.await("the rest", func(f *frame) bool { return f.kind == frameData && string(f.payload) == "ong" && f.end() })
	if code := r.awaitReset(1); code != NoError {
		t.Errorf("code %d", code)
	}
	if x := w.clients.wait(t, 1)[0]; x.Failure != "" || x.Status != 413 {
		t.Errorf("%+v", x)
	}
	r.ping()
}

// TestInterim passes 1xx responses as they come.
func TestInterim(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.post(1, "expect", "100-continue")
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	s.headers(1, false, ":status", "100")
	s.headers(1, false, ":status", "103", "link", "</a>")
	s.flush()
	if f := r.awaitHead(1); f.field(":status") != "100" || f.end() {
		t.Errorf("%v", f.fields)
	}
	if f := r.awaitHead(1); f.field(":status") != "103" || f.field("link") != "</a>" {
		t.Errorf("%v", f.fields)
	}
	r.data(1, true, []byte("body"))
	r.flush()
	s.await("the body", func(f *frame) bool { return f.kind == frameData && f.end() })
	s.headers(1, true, ":status", "200")
	s.flush()
	if f := r.awaitHead(1); f.field(":status") != "200" || !f.end() {
		t.Errorf("%v", f.fields)
	}
}

// TestTunnels: CONNECT, plain and extended, with half-close both ways.
func TestTunnels(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	var s *raw
	for i, head := range [][]string{
		{":method", "CONNECT", ":authority", "db.test:5432"},
		{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/chat", ":authority", "a.test"},
	} {
		r := w.client()
		f := r.await("SETTINGS", func(f *frame) bool { return f.kind == frameSettings })
		if !bytes.Contains(f.payload, []byte{0, settingConnect, 0, 0, 0, 1}) {
			t.Error("extended CONNECT is not offered")
		}
		r.headers(1, false, head...)
		r.flush()
		if s == nil {
			s = a.accept(setting{settingConnect, 1})
		}
		id := uint32(1 + 2*i)
		if f := s.awaitHead(id); f.field(":method") != "CONNECT" || f.field(":protocol") != map[int]string{0: "", 1: "websocket"}[i] {
			t.Errorf("%v", f.fields)
		}
		s.headers(id, false, ":status", "200")
		s.data(id, false, []byte("hello"))
		s.flush()
		r.awaitHead(1)
		r.await("bytes", func(f *frame) bool { return string(f.payload) == "hello" })
		r.data(1, true, []byte("over"))
		r.flush()
		s.await("the client's end", func(f *frame) bool { return f.end() && string(f.payload) == "over" })
		s.data(id, true, []byte("and out"))
		s.flush()
		r.await("the end", func(f *frame) bool { return f.end() && string(f.payload) == "and out" })
		if x := w.clients.wait(t, i+1)[i]; !x.Tunnel || x.Failure != "" {
			t.Errorf("%+v", x)
		}
		r.c.Close()
	}
}

// TestNoExtendedConnect: an application that does not offer it is answered for.
func TestNoExtendedConnect(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.headers(1, false, ":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/chat", ":authority", "a.test")
	r.flush()
	a.accept()
	if f := r.awaitHead(1); f.field(":status") != "501" || f.field("assay-error") != "connect-protocol" {
		t.Errorf("%v", f.fields)
	}
	r.ping()
}

// TestUnreachable: an application that does not listen, resets, or speaks something else.
func TestUnreachable(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	a.l.Close()
	r.get(1)
	r.flush()
	if f := r.awaitHead(1); f.field(":status") != "503" || f.field("assay-error") != "unreachable" {
		t.Errorf("%v", f.fields)
	}
	r.get(3, "content-type", "application/grpc")
	r.flush()
	if f := r.awaitHead(3); f.field("grpc-status") != "14" {
		t.Errorf("%v", f.fields)
	}

	b := newApp(t)
	w = newWorld(t, b.addr)
	r = w.client()
	r.post(1)
	r.flush()
	s := b.accept()
	s.awaitHead(1)
	s.c.Close()
	if f := r.awaitHead(1); f.field(":status") != "502" || f.field("assay-error") != "app-reset" {
		t.Errorf("%v", f.fields)
	}
	// Between two messages of a gRPC response the client is told in gRPC's way, within
	// one the stream is reset.
	for i, cut := range []bool{false, true} {
		id := uint32(3 + 2*i)
		r.post(id, "content-type", "application/grpc")
		r.flush()
		s = b.accept()
		s.awaitHead(1)
		s.headers(1, false, ":status", "200", "content-type", "application/grpc+proto")
		s.data(1, false, hello)
		if cut {
			s.data(1, false, hello[:7])
		}
		s.flush()
		r.awaitHead(id)
		r.await("a message", func(f *frame) bool { return f.kind == frameData })
		s.c.Close()
		if cut {
			if code := r.awaitReset(id); code != InternalError {
				t.Errorf("code %d", code)
			}
		} else if f := r.awaitHead(id); f.field("grpc-status") != "14" || !f.end() {
			t.Errorf("%v", f.fields)
		}
	}
	// HTTP/1 where HTTP/2 is expected.
	r.get(7)
	r.flush()
	b.l.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience))
	c, err := b.l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
	if f := r.awaitHead(7); f.field(":status") != "502" || f.field("assay-error") != "bad-request" {
		t.Errorf("%v", f.fields)
	}
	c.Close()
}

// TestClientGone: the end of the client's connection cancels what it asked for.
func TestClientGone(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.post(1)
	r.get(3)
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	s.awaitHead(3)
	r.c.Close()
	if code := s.awaitReset(1); code != Cancel {
		t.Errorf("code %d", code)
	}
	for _, x := range append(w.clients.wait(t, 2), w.servers.wait(t, 2)...) {
		if x.Failure != ClientGone {
			t.Errorf("%+v", x)
		}
	}
	s.ping()
}

// TestNobodyHoldsUpOthers: a stream whose reader has closed its window, in either
// direction, stops neither others of its connection nor the reader of the session; and
// memory for it is bounded.
func TestNobodyHoldsUpOthers(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client(setting{settingWindow, 0}) // the client reads nothing of any stream
	r.get(1)
	r.flush()
	s := a.accept(setting{settingWindow, 0}) // nor does the application
	s.awaitHead(1)
	s.headers(1, false, ":status", "200")
	s.flush()
	r.awaitHead(1)
	// As much as it is allowed to: a window of a stream, and one of mux, and no more.
	total := 0
	window := initialWindow
	chunk := make([]byte, 16000)
	for {
		n := min(window, len(chunk))
		if n > 0 {
			s.data(1, false, chunk[:n])
			s.flush()
			total, window = total+n, window-n
			continue
		}
		s.ping2(1, &window)
		if window == 0 {
			break
		}
	}
	if total < 256<<10 || total > 600<<10 {
		t.Errorf("%d bytes were taken for a reader that reads nothing", total)
	}
	// Others go on, whole, in both directions.
	for id := uint32(3); id < 20; id += 2 {
		r.post(id)
		r.flush()
		r.out = appendWindow(r.out, id, 100)
		s.awaitHead(id)
		s.out = appendWindow(s.out, id, 100)
		s.flush()
		r.data(id, true, []byte("question"))
		r.flush()
		s.await("the question", func(f *frame) bool { return f.stream == id && string(f.payload) == "question" })
		s.headers(id, false, ":status", "200")
		s.data(id, true, []byte("answer"))
		s.flush()
		r.await("the answer", func(f *frame) bool { return f.stream == id && string(f.payload) == "answer" })
	}
	// The first one gets everything once its reader opens the window.
	r.out = appendWindow(r.out, 1, 1<<20)
	r.out = appendWindow(r.out, 0, 1<<20)
	r.flush()
	got := 0
	for got < total {
		f := r.await("the rest", func(f *frame) bool { return f.stream == 1 && f.kind == frameData })
		got += f.length
	}
}

// ping2 is ping that adds the stream's WINDOW_UPDATEs to window.
func (r *raw) ping2(id uint32, window *int) {
	r.t.Helper()
	r.out = appendPing(r.out, 0, []byte("are-you?"))
	r.flush()
	r.await("PING", func(f *frame) bool {
		if f.kind == frameWindow && f.stream == id {
			*window += int(binary.BigEndian.Uint32(f.payload))
		}
		return f.kind == framePing && f.flags&flagAck != 0
	})
}

// TestDrain tells the client twice, carries what comes meanwhile, and ends when the last
// stream has.
func TestDrain(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr)
	r := w.client()
	r.post(1)
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	w.out.Drain()
	f := r.await("GOAWAY", func(f *frame) bool { return f.kind == frameGoaway })
	if last := binary.BigEndian.Uint32(f.payload); last != maxWindow || f.code() != NoError {
		t.Errorf("first GOAWAY: last %d", last)
	}
	r.get(3) // it crossed the GOAWAY
	r.flush()
	s.awaitHead(3)
	r.out = appendPing(r.out, flagAck, drainPing)
	r.flush()
	f = r.await("GOAWAY", func(f *frame) bool { return f.kind == frameGoaway })
	if last := binary.BigEndian.Uint32(f.payload); last != 3 {
		t.Errorf("second GOAWAY: last %d", last)
	}
	s.headers(3, true, ":status", "200")
	s.flush()
	r.awaitHead(3)
	r.data(1, true, []byte("x"))
	r.flush()
	s.await("the end", func(f *frame) bool { return f.stream == 1 && f.end() })
	s.headers(1, true, ":status", "200")
	s.flush()
	r.awaitHead(1)
	if _, err := r.next(); err != io.EOF {
		t.Errorf("after the last stream: %v", err)
	}
	if err := <-w.served; err != nil {
		t.Error(err)
	}
}

// TestMaxStreams: beyond what was allowed streams are refused, unread; towards the
// application they wait.
func TestMaxStreams(t *testing.T) {
	a := newApp(t)
	w := newWorld(t, a.addr, func(w *world) { w.out.Config.MaxStreams = 4; w.inbound.MaxConns = 1 })
	r := w.client()
	r.get(1)
	r.flush()
	s := a.accept(setting{settingMaxStreams, 2})
	s.awaitHead(1)
	s.headers(1, true, ":status", "200")
	s.ping() // its SETTINGS are known by now
	r.awaitHead(1)
	for id := uint32(3); id <= 11; id += 2 {
		r.get(id)
	}
	r.flush()
	if code := r.awaitReset(11); code != RefusedStream {
		t.Errorf("code %d", code)
	}
	s.awaitHead(3)
	s.awaitHead(5)
	s.out = appendPing(s.out, 0, []byte("are-you?"))
	s.flush()
	s.await("PING without another request", func(f *frame) bool {
		if f.kind == frameHeaders {
			t.Error("the application was sent more than it allows")
		}
		return f.kind == framePing
	})
	for id := uint32(3); id <= 9; id += 2 {
		if id > 5 {
			s.awaitHead(id)
		}
		s.headers(id, true, ":status", "200")
		s.flush()
	}
	for _, x := range w.clients.wait(t, 6) {
		if x.Failure != "" && x.Failure != ErrBusy.Reason {
			t.Errorf("%+v", x)
		}
	}
}

// TestPolicy: timeouts of a request and of a try, a caller's own deadline, and statuses
// that are tried again.
func TestPolicy(t *testing.T) {
	a := newApp(t)
	shared := &guard.Service{Counts: &guard.Counts{}}
	w := newWorld(t, a.addr, func(w *world) { w.guard = shared })
	allow := func(p guard.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.policy = &p
	}
	r := w.client()
	allow(guard.Request{Timeout: 50 * time.Millisecond})
	r.get(1)
	r.flush()
	s := a.accept()
	s.awaitHead(1)
	if f := r.awaitHead(1); f.field(":status") != "504" || f.field("assay-error") != "timeout" {
		t.Errorf("%v", f.fields)
	}
	if code := s.awaitReset(1); code != Cancel {
		t.Errorf("code %d", code)
	}
	allow(guard.Request{TryTimeout: 50 * time.Millisecond, Retry: guard.Retry{Backoff: time.Millisecond}})
	r.get(3)
	r.flush()
	for _, id := range []uint32{3, 5, 7} {
		s.awaitHead(id)
	}
	if f := r.awaitHead(3); f.field(":status") != "504" || f.field("assay-error") != "try-timeout" {
		t.Errorf("%v", f.fields)
	}
	allow(guard.Request{Retry: guard.Retry{Codes: []int{503}}})
	r.get(5)
	r.flush()
	s.awaitHead(9)
	s.headers(9, true, ":status", "503")
	s.flush()
	s.awaitHead(11)
	s.headers(11, true, ":status", "200")
	s.flush()
	if f := r.awaitHead(5); f.field(":status") != "200" {
		t.Errorf("%v", f.fields)
	}
	// The caller's own deadline is kept, and passed on as what is left of it.
	w.mu.Lock()
	w.refuse = []mux.Code{mux.Refused}
	w.mu.Unlock()
	allow(guard.Request{Retry: guard.Retry{Backoff: 20 * time.Millisecond}})
	r.post(7, "content-type", "application/grpc", "grpc-timeout", "40S")
	r.data(7, true, hello)
	r.flush()
	f := s.awaitHead(13)
	left, ok := guard.ParseGRPCTimeout(f.field("grpc-timeout"))
	if !ok || left > 40*time.Second-20*time.Millisecond || left <= 0 {
		t.Errorf("%q is left of 40S", f.field("grpc-timeout"))
	}
	s.headers(13, true, ":status", "200", "content-type", "application/grpc", "grpc-status", "0")
	s.flush()
	if f := r.awaitHead(7); f.field("grpc-status") != "0" {
		t.Errorf("%v", f.fields)
	}
	r.post(9, "content-type", "application/grpc", "grpc-timeout", "50m")
	r.data(9, true, hello)
	r.flush()
	if f := r.awaitHead(9); f.field("grpc-status") != "4" {
		t.Errorf("%v", f.fields)
	}
	n := map[string]uint64{}
	shared.Counts.Each(func(name string, c uint64) { n[name] = c })
	if n["timeout"] != 2 || n["try-timeout"] != 1 || n["retry-timeout"] != 2 || n["retry-status"] != 1 || n["retry-unread"] != 1 {
		t.Errorf("%v", n)
	}
}
