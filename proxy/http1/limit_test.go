package http1

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

func policy(p guard.Request) option {
	return func(w *world) { w.policy, w.guard = &p, &guard.Service{Counts: new(guard.Counts)} }
}

// decided returns what was counted, as "name=n".
func decided(w *world) string {
	var list []string
	w.guard.Counts.Each(func(name string, n uint64) { list = append(list, fmt.Sprintf("%s=%d", name, n)) })
	return strings.Join(list, " ")
}

const (
	putA  = "PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
	postA = "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
	busy  = "HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
)

// expectOwn wants an answer of our own, after which the connection may go on.
func expectOwn(t testing.TB, c io.Reader, status int, reason string) http.Header {
	t.Helper()
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != status || r.Header.Get("Assay-Error") != reason {
		t.Fatalf("got %d %v %q %v, want %d %s", r.StatusCode, r.Header, text, err, status, reason)
	}
	return r.Header
}

func TestTimeout(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Timeout: 50 * time.Millisecond}))
	c := w.dial()
	for range 2 { // the connection goes on
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		expectOwn(t, c, 504, "timeout")
		expectGone(t, a)
	}
	say(t, c, getA)
	a := app.accept()
	expect(t, a, getA)
	say(t, a, okay)
	expect(t, c, okay)
	for _, x := range w.clients.wait(t, 3)[:2] {
		if x.Status != 504 || x.Failure != "timeout" {
			t.Errorf("%+v", x)
		}
	}
	if got := decided(w); got != "timeout=2" {
		t.Error(got)
	}
}

func TestTimeoutOfAnUpload(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Timeout: 50 * time.Millisecond}))
	c := w.dial()
	const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello"
	say(t, c, head)
	a := app.accept()
	expect(t, a, head)
	expectOwn(t, c, 504, "timeout")
	expectEnd(t, c) // what is left of the request is nobody's
	expectGone(t, a)
}

func TestTimeoutWithinAResponse(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Timeout: 50 * time.Millisecond}))
	c := w.dial()
	say(t, c, getA)
	a := app.accept()
	expect(t, a, getA)
	const part = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"
	say(t, a, part)
	expect(t, c, part)
	expectReset(t, c)
	expectGone(t, a)
	if x := w.clients.wait(t, 1)[0]; x.Failure != "timeout" || x.Status != 200 {
		t.Errorf("%+v", x)
	}
}

func TestTimeoutEndsWithATunnel(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Timeout: 30 * time.Millisecond, TryTimeout: 20 * time.Millisecond}))
	c := w.dial()
	const ask = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
	const yes = "HTTP/1.1 101 Yes\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
	say(t, c, ask)
	a := app.accept()
	expect(t, a, ask)
	say(t, a, yes)
	expect(t, c, yes)
	until := time.Now().Add(100 * time.Millisecond)
	for time.Now().Before(until) {
		swap(t, c, a, "ping", "pong")
	}
}

func TestTryTimeout(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{TryTimeout: 50 * time.Millisecond, Retry: guard.Retry{Backoff: time.Millisecond}}))
	c := w.dial()
	say(t, c, putA)
	first := app.accept()
	expect(t, first, putA)
	second := app.accept()
	expect(t, second, putA)
	expectGone(t, first)
	say(t, second, okay)
	expect(t, c, okay)
	if x := w.clients.wait(t, 1)[0]; x.Failure != "" || x.Status != 200 || x.Attempt != 1 {
		t.Errorf("%+v", x)
	}
	// What may have been acted upon is not sent again.
	say(t, c, postA)
	expect(t, second, postA)
	expectOwn(t, c, 504, "try-timeout")
	if got := decided(w); got != "retry-timeout=1 try-timeout=1" {
		t.Error(got)
	}
}

func TestTryTimeoutIsNotTheUploads(t *testing.T) {
	app := newScript(t)
	c := newWorld(t, meshed, app.addr, policy(guard.Request{TryTimeout: 100 * time.Millisecond})).dial()
	const head = "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\n"
	say(t, c, head)
	a := app.accept()
	expect(t, a, head)
	for range 30 {
		say(t, c, "x")
		expect(t, a, "x")
		time.Sleep(5 * time.Millisecond) // a slow client, longer in all than a try may take
	}
	say(t, a, okay)
	expect(t, c, okay)
}

func TestRetryStatus(t *testing.T) {
	p := guard.Request{Retry: guard.Retry{Codes: []int{503}, Backoff: time.Millisecond, Attempts: 2}}
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(p))
	c := w.dial()
	say(t, c, putA)
	a := app.accept()
	swapA := func(req, resp string) {
		t.Helper()
		expect(t, a, req)
		say(t, a, resp)
	}
	swapA(putA, busy)
	swapA(putA, busy[:20])
	say(t, a, busy[20:])
	swapA(putA, okay)
	expect(t, c, okay)
	// The last one is the client's, and so is that of a request which may not be repeated.
	say(t, c, getA)
	for range 3 {
		swapA(getA, busy)
	}
	expect(t, c, busy)
	say(t, c, postA)
	swapA(postA, busy)
	expect(t, c, busy)
	if got := decided(w); got != "retry-status=4 retry-limit=1" {
		t.Error(got)
	}
	xs := w.clients.wait(t, 3)
	if xs[0].Status != 200 || xs[0].ResponseBytes != int64(len(okay)) || xs[1].Status != 503 || xs[1].Attempt != 2 || xs[2].Attempt != 0 {
		t.Errorf("%+v", xs)
	}
}

func TestRetryStatusOfRepeatable(t *testing.T) {
	app := newScript(t)
	c := newWorld(t, meshed, app.addr, policy(guard.Request{Retry: guard.Retry{Codes: []int{503}, Repeatable: true}})).dial()
	say(t, c, postA)
	a := app.accept()
	expect(t, a, postA)
	say(t, a, busy)
	expect(t, a, postA)
	say(t, a, okay)
	expect(t, c, okay)
}

func TestNoRetryOfWhatIsNotAtHand(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Retry: guard.Retry{Codes: []int{503}}}))
	c := w.dial()
	const head = "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
	say(t, c, head)
	a := app.accept()
	expect(t, a, head)
	say(t, c, "hello")
	expect(t, a, "hello")
	say(t, c, "hello")
	expect(t, a, "hello")
	say(t, a, busy)
	expect(t, c, busy)
	// An interim response was passed on: the client knows of this attempt.
	say(t, c, getA)
	expect(t, a, getA)
	const hints = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
	say(t, a, hints+busy)
	expect(t, c, hints+busy)
	if got := decided(w); got != "" {
		t.Error(got)
	}
}

func TestRetryBudget(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Retry: guard.Retry{Codes: []int{503}, Backoff: time.Millisecond}}))
	w.guard.Budget.Set(guard.Budgeted{Percent: -1, MinPerSecond: 1, Interval: 2 * time.Second}) // two in two seconds
	c := w.dial()
	say(t, c, getA)
	a := app.accept()
	for range 3 {
		expect(t, a, getA)
		say(t, a, busy)
	}
	expect(t, c, busy)
	say(t, c, getA)
	expect(t, a, getA)
	say(t, a, busy)
	expect(t, c, busy)
	if got := decided(w); got != "retry-status=2 retry-limit=1 retry-budget=1" {
		t.Error(got)
	}
}

func TestRetriesEndInTime(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Timeout: time.Second, Retry: guard.Retry{Codes: []int{503}, Backoff: time.Minute}}))
	c := w.dial()
	say(t, c, getA)
	a := app.accept()
	expect(t, a, getA)
	say(t, a, busy)
	expect(t, c, busy) // at once: an attempt in a minute would be too late
}

func TestClientLeavesBetweenAttempts(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, policy(guard.Request{Retry: guard.Retry{Codes: []int{503}, Backoff: 300 * time.Millisecond}}))
	c := w.dial()
	say(t, c, getA)
	a := app.accept()
	expect(t, a, getA)
	say(t, a, busy)
	c.SetLinger(0)
	c.Close()
	if x := w.clients.wait(t, 1)[0]; x.Failure != ClientGone {
		t.Errorf("%+v", x)
	}
}

func TestOverloadedSaysWhen(t *testing.T) {
	w := newWorld(t, meshed, newScript(t).addr, policy(guard.Request{Retry: guard.Retry{Attempts: -1}}),
		func(w *world) { w.refuse = []mux.Code{mux.Overloaded} })
	c := w.dial()
	say(t, c, getA)
	if head := expectOwn(t, c, 503, "overloaded"); head.Get("Retry-After") != "1" {
		t.Error(head)
	}
}
