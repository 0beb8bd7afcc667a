package http2

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"assay.dev"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

func addFields(drop []string, pairs ...string) *route.HeadEdit {
	e := &route.HeadEdit{Drop: drop}
	for i := 0; i < len(pairs); i += 2 {
		e.Append = append(e.Append, assay.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return e
}

func TestPlans(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Drop", "1")
		w.Header().Set("X-Seen", fmt.Sprint(r.Method, " ", r.Host, " ", r.URL.RequestURI(), " ", r.Header.Get("X-Set"), " ", r.Header.Get("X-Gone"), len(b)))
		w.Write(b)
	})
	var mu sync.Mutex
	copied, whole := map[string]int{}, 0
	w := newWorld(t, app, func(w *world) {
		w.refuse = []mux.Code{mux.Refused} // the plan holds for another try
		w.plan = func(x *Exchange) *Plan {
			h := x.Request
			path, _, _ := strings.Cut(h.Path, "?")
			switch path {
			case "/moved":
				return &Plan{Answer: &Answer{Status: 302, Fields: []assay.HeaderField{{Name: "Location", Value: "/there"}}}}
			case "/bad":
				return &Plan{Failure: &Failure{Status: 500, Code: 14, Reason: "invalid-rule", Text: "x", RetryAfter: 7}}
			case "/plain":
				return nil
			}
			fields := Edit(slices.Clone(h.Fields), addFields([]string{"x-gone", "x-set"}, "X-Set", "1"))
			for i := range fields {
				switch fields[i].Name {
				case ":path":
					fields[i].Value = "/b?q"
				case ":authority":
					fields[i].Value = "new.example"
				}
			}
			return &Plan{
				Fields:   fields,
				Response: [3]*route.HeadEdit{addFields([]string{"x-drop"}, "X-Served", "yes"), nil, addFields(nil, "Set-Cookie", "a=b")},
				Copy: func(p []byte, fin bool) {
					mu.Lock()
					defer mu.Unlock()
					copied[path] += len(p)
					if fin {
						whole++
					}
				},
			}
		}
	})
	c := httpClient(t)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	ask := func(method, path, body string) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+w.addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Gone", "0")
		req.Header.Set("X-Set", "0")
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode == 200 && string(b) != body {
			t.Errorf("%s: a body of %d bytes, %v, want %d", path, len(b), err, len(body))
		}
		return resp
	}
	large := strings.Repeat("0123456789abcdef", 64<<10)
	for _, one := range [][2]string{{"/a", "small"}, {"/large", large}} { // the first is refused once
		path, body := one[0], one[1]
		resp := ask("POST", path, body)
		h := resp.Header
		if want := fmt.Sprint("POST new.example /b?q 1 ", len(body)); h.Get("X-Seen") != want || h.Get("X-Served") != "yes" || h.Get("X-Drop") != "" || h.Get("Set-Cookie") != "a=b" {
			t.Errorf("%s: %v, want %s", path, h, want)
		}
	}
	if resp := ask("GET", "/moved", ""); resp.StatusCode != 302 || resp.Header.Get("Location") != "/there" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	if resp := ask("POST", "/moved", large); resp.StatusCode != 302 {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	if resp := ask("GET", "/bad", ""); resp.StatusCode != 500 || resp.Header.Get("Assay-Error") != "invalid-rule" || resp.Header.Get("Retry-After") != "7" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	if resp := ask("GET", "/plain", ""); resp.Header.Get("X-Drop") != "1" || !strings.HasSuffix(resp.Header.Get("X-Seen"), "/plain 0 00") {
		t.Errorf("%v", resp.Header)
	}
	w.clients.wait(t, 6)
	mu.Lock()
	defer mu.Unlock()
	if copied["/a"] < 5 || copied["/large"] < len(large) || whole != 2 {
		t.Errorf("copied %v, %d whole", copied, whole)
	}
}
