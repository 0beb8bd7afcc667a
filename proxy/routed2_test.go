package proxy

import (
	"context"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/proxy/http2"
)

// ask2 does what the engine does for one request of HTTP/2.
func ask2(d interface {
	http2.Dispatcher
	http2.Planner
}, path string, done ended, extra ...http2.Field) (*http2.Plan, error) {
	fields := append([]http2.Field{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "web"}}, extra...)
	x := &http2.Exchange{Request: &http2.Head{Method: "POST", Scheme: "http", Path: path, Authority: "web", Fields: fields}, Code: -1}
	d.Begin(x)
	x.Plan = d.Plan(x)
	var err error
	if p := x.Plan; p != nil && p.Failure != nil {
		err, x.Status, x.Failure = p.Failure, p.Failure.Status, p.Failure.Reason
	} else if p == nil || p.Answer == nil {
		if _, _, err = d.Dispatch(context.Background(), x, nil, true, done, nil, true); err == nil {
			<-done
			x.Status = 200
		}
	} else {
		x.Status = p.Answer.Status
	}
	d.End(x)
	return x.Plan, err
}

func TestRoutesOfHTTP2(t *testing.T) {
	match := func(path string) []assay.RouteMatch {
		return []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: path}}}
	}
	edits := assay.RouteEdits{
		Path:    &assay.PathEdit{Match: "/old", With: "/new"},
		Request: assay.HeaderEdit{Set: []assay.HeaderField{{Name: "X-Env", Value: "canary"}}, Remove: []string{"x-secret"}},
	}
	d1 := routedServices(t, "10.182.0.1:80", webRoute(
		assay.RouteRule{Matches: match("/old"), RouteEdits: edits, Backends: []assay.RouteBackend{to("bank/v2", 1)}},
		assay.RouteRule{Matches: match("/refuse"), Refuse: "InvalidKind: filter ExtensionRef"},
		assay.RouteRule{Matches: match("/moved"), Redirect: &assay.Redirect{Status: 301, Host: "new.example"}},
		assay.RouteRule{Matches: match("/split"), Backends: []assay.RouteBackend{to("bank/v1", 9), to("bank/v2", 1)}},
	), "bank/v1", "bank/v2")
	d := &streams{dispatcher: dispatcher{o: d1.o, payload: d1.payload}}
	d.o.protocol = assay.HTTP2
	done := make(ended, 1)

	p, err := ask2(d, "/old/x?a=b", done, http2.Field{Name: "x-secret", Value: "1"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range p.Fields {
		got = append(got, f.Name+"="+f.Value)
	}
	if s := strings.Join(got, " "); s != ":method=POST :scheme=http :path=/new/x?a=b :authority=web x-env=canary" {
		t.Errorf("%s", s)
	}
	if _, err := ask2(d, "/refuse", done); err == nil || err.(*http2.Failure).Status != 500 {
		t.Errorf("%v", err)
	}
	if _, err := ask2(d, "/none", done); err == nil || err.(*http2.Failure).Status != 404 || err.(*http2.Failure).Code != 12 {
		t.Errorf("%v", err)
	}
	if p, err := ask2(d, "/moved", done); err != nil || p.Answer.Status != 301 || p.Answer.Fields[0].Value != "http://new.example/moved" {
		t.Errorf("%+v, %v", p, err)
	}
	const n = 1000
	for range n {
		if _, err := ask2(d, "/split", done); err != nil {
			t.Fatal(err)
		}
	}
	counts := requestsTo(d.o.p)
	if v2 := counts["bank/v2:80"]; v2 < 50 || v2 > 160 || counts["bank/v1:80"]+v2 != n+1 {
		t.Errorf("%v", counts)
	}
	if counts["bank/web:80 answered-by-rule"] != 1 || counts["bank/web:80 refused"] != 2 {
		t.Errorf("%v", counts)
	}
	for _, svc := range d.o.snap.services.All() {
		if e := svc.ports[0].v4.Endpoints()[0]; e.InFlight() != 0 {
			t.Errorf("%s: %d in flight", svc.Key(), e.InFlight())
		}
	}
}
