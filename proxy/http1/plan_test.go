package http1

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"assay.dev"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

// planning makes a world whose requests follow a plan.
func planning(f func(x *Exchange, head []byte) *Plan) option {
	return func(w *world) { w.plan = f }
}

func setFields(drop []string, pairs ...string) *route.HeadEdit {
	e := &route.HeadEdit{Drop: drop}
	for i := 0; i < len(pairs); i += 2 {
		e.Append = append(e.Append, assay.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return e
}

// edited is a plan that rewrites everything that can be.
func edited(x *Exchange, head []byte) *Plan {
	h := NewHead(head, len(head))
	host := []byte("new.example")
	target := x.Request.AppendTarget(nil, host, &assay.PathEdit{Match: "/a", With: "/b"})
	return &Plan{
		Head:     h.AppendRequest(nil, target, host, setFields([]string{"x-drop", "x-set"}, "X-Set", "1")),
		Response: [3]*route.HeadEdit{setFields([]string{"server"}, "X-Served", "yes"), nil, setFields(nil, "Set-Cookie", "a=b")},
	}
}

func TestEditsAreBytesOfTheHead(t *testing.T) {
	app := newScript(t)
	c := newWorld(t, meshed, app.addr, planning(edited)).dial()
	swapEdited := func(a io.ReadWriter, request, seen, response, got string) {
		t.Helper()
		say(t, c, request)
		expect(t, a, seen)
		say(t, a, response)
		expect(t, c, got)
	}
	say(t, c, "POST /a/x?q=/a HTTP/1.1\r\nhost:  old.example \r\nX-drop: 1\r\nx-Odd:\t kept as it is  \r\nX-SET: 2\r\nContent-Length: 5\r\n\r\nhello")
	a := app.accept()
	expect(t, a, "POST /b/x?q=/a HTTP/1.1\r\nHost: new.example\r\nx-Odd:\t kept as it is  \r\nContent-Length: 5\r\nX-Set: 1\r\n\r\nhello")
	say(t, a, "HTTP/1.1 103 Early Hints\r\nServer: s\r\n\r\nHTTP/1.1 200 Fine\r\nServer: s\r\nETag:  x\r\nContent-Length: 2\r\n\r\nok")
	expect(t, c, "HTTP/1.1 103 Early Hints\r\nServer: s\r\n\r\nHTTP/1.1 200 Fine\r\nETag:  x\r\nContent-Length: 2\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\nok")
	// An absolute target names the host itself.
	swapEdited(a, "GET http://old.example/a HTTP/1.1\r\nHost: old.example\r\n\r\n", "GET http://new.example/b HTTP/1.1\r\nHost: new.example\r\nX-Set: 1\r\n\r\n",
		"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\n")
	swapEdited(a, "GET http://old.example?a=b HTTP/1.1\r\nHost: old.example\r\n\r\n", "GET http://new.example/b/?a=b HTTP/1.1\r\nHost: new.example\r\nX-Set: 1\r\n\r\n",
		"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\n")
	swapEdited(a, "OPTIONS * HTTP/1.1\r\nHost: old.example\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: new.example\r\nX-Set: 1\r\n\r\n",
		"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\n")
}

// TestEditedHeadInPieces: the response's head comes byte by byte.
func TestEditedHeadInPieces(t *testing.T) {
	app := newScript(t)
	c := newWorld(t, meshed, app.addr, planning(edited)).dial()
	say(t, c, "GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
	a := app.accept()
	expect(t, a, "GET /b HTTP/1.1\r\nHost: new.example\r\nX-Set: 1\r\n\r\n")
	for _, b := range []byte("HTTP/1.1 200 OK\r\nServer: s\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n") {
		say(t, a, string(b))
	}
	expect(t, c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
}

// TestEditedBodiesAreWhole: a large body both ways with a reader that is slow, so that
// credit has to be right.
func TestEditedBodiesAreWhole(t *testing.T) {
	body := strings.Repeat("0123456789abcdef", 256<<10) // 4 MiB
	app := newScript(t)
	c := newWorld(t, meshed, app.addr, planning(edited)).dial()
	var up sync.WaitGroup
	up.Go(func() { io.WriteString(c, "PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4194304\r\n\r\n"+body) })
	a := app.accept()
	expect(t, a, "PUT /b HTTP/1.1\r\nHost: new.example\r\nContent-Length: 4194304\r\nX-Set: 1\r\n\r\n")
	got := make([]byte, len(body))
	if _, err := io.ReadFull(a, got); err != nil || string(got) != body {
		t.Fatalf("the request's body is not whole: %v", err)
	}
	up.Wait()
	up.Go(func() { io.WriteString(a, "HTTP/1.1 200 OK\r\nContent-Length: 4194304\r\n\r\n"+body) })
	expect(t, c, "HTTP/1.1 200 OK\r\nContent-Length: 4194304\r\nX-Served: yes\r\nSet-Cookie: a=b\r\n\r\n")
	if _, err := io.ReadFull(c, got); err != nil || string(got) != body {
		t.Fatalf("the response's body is not whole: %v", err)
	}
	up.Wait()
}

func TestPlanAnswers(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, planning(func(x *Exchange, head []byte) *Plan {
		switch path, _ := x.Request.Path(); string(path) {
		case "/moved":
			return &Plan{Answer: &Answer{Status: 302, Fields: []assay.HeaderField{{Name: "Location", Value: "http://h/there"}}}}
		case "/leave":
			return &Plan{Answer: &Answer{Status: 204}}
		case "/bad":
			return &Plan{Failure: &Failure{Status: 500, Reason: "invalid-rule", Text: "x"}}
		}
		return nil
	}))
	c := w.dial()
	ask := func(head, status string) string {
		t.Helper()
		say(t, c, head)
		var got []byte
		for !bytes.HasSuffix(got, []byte("\r\n\r\n")) {
			b := make([]byte, 1)
			if _, err := c.Read(b); err != nil {
				t.Fatalf("%q: %v", got, err)
			}
			got = append(got, b...)
		}
		if !strings.HasPrefix(string(got), "HTTP/1.1 "+status+"\r\nDate: ") {
			t.Errorf("%q, want %s", got, status)
		}
		return string(got)
	}
	if got := ask("GET /moved HTTP/1.1\r\nHost: h\r\n\r\n", "302 Found"); !strings.HasSuffix(got, "\r\nLocation: http://h/there\r\nContent-Length: 0\r\n\r\n") {
		t.Errorf("%q", got)
	}
	// With a body at hand the connection lives on; HEAD is answered the same.
	ask("POST /moved HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", "302 Found")
	ask("HEAD /leave HTTP/1.1\r\nHost: h\r\n\r\n", "204 No Content")
	say(t, c, "GET /else HTTP/1.1\r\nHost: h\r\n\r\n")
	a := app.accept()
	expect(t, a, "GET /else HTTP/1.1\r\nHost: h\r\n\r\n")
	say(t, a, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	expect(t, c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	// Without it nobody can say where the next request begins.
	if got := ask("POST /moved HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n", "302 Found"); !strings.Contains(got, "Connection: close\r\n") {
		t.Errorf("%q", got)
	}
	expectEnd(t, c)
	c = w.dial()
	say(t, c, "GET /bad HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
	expectAnswer(t, c, "500", "invalid-rule")
	ended := w.clients.wait(t, 6)
	var got []string // two connections: the order of their last ones is anybody's
	for _, x := range ended {
		got = append(got, fmt.Sprint(x.Status, x.Failure))
	}
	slices.Sort(got)
	if want := []string{"200", "204", "302", "302", "302", "500invalid-rule"}; !slices.Equal(got, want) {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// TestCopy: the copy has what was sent, also when the first upstream did not take it.
func TestCopy(t *testing.T) {
	var mu sync.Mutex
	var copied []byte
	fins := 0
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, planning(func(x *Exchange, head []byte) *Plan {
		return &Plan{Copy: func(p []byte, fin bool) {
			mu.Lock()
			defer mu.Unlock()
			copied = append(copied, p...)
			if fin {
				fins++
			}
		}}
	}), func(w *world) { w.refuse = []mux.Code{mux.Refused} })
	c := w.dial()
	const head = "POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
	say(t, c, head)
	a := app.accept()
	expect(t, a, head)
	say(t, c, "3\r\nabc\r\n")
	expect(t, a, "3\r\nabc\r\n")
	say(t, c, "0\r\n\r\n")
	expect(t, a, "0\r\n\r\n")
	say(t, a, "HTTP/1.1 204 No Content\r\n\r\n")
	expect(t, c, "HTTP/1.1 204 No Content\r\n\r\n")
	mu.Lock()
	defer mu.Unlock()
	if string(copied) != head+"3\r\nabc\r\n0\r\n\r\n" || fins != 1 {
		t.Errorf("copied %q, %d ends", copied, fins)
	}
}

func TestHeadFields(t *testing.T) {
	h := NewHead([]byte("GET / HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\nx-b: 2\r\nX-a: 3\r\nX-Empty:\r\n\r\nX-Body: no"), 67)
	var scratch [32]byte
	for name, want := range map[string]string{"host": "h", "x-a": "1, 3", "x-b": "2", "x-empty": "", "x-body": "-", "x": "-", "x-a:": "-"} {
		got, ok := h.Field(name, scratch[:0])
		if text := string(got); ok != (want != "-") || ok && text != want {
			t.Errorf("%s: %q %v, want %q", name, text, ok, want)
		}
	}
}
