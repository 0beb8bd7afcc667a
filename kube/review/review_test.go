package review

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// token is one that an API server has to look at; who has no key for its signature can
// write it as well.
func token(subject, audience string) string {
	payload, _ := json.Marshal(map[string]any{"sub": subject, "aud": audience})
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"none"}`)) + "." + enc(payload) + ".c2ln"
}

const (
	agent = "system:serviceaccount:assay-system:assay-agent"
	pod   = "system:serviceaccount:shop:web"
)

// TestHostileAnswers: whatever an API server, or somebody in its place, answers, only what is
// clear counts. The real one is asked in test/kubernetes.
func TestHostileAnswers(t *testing.T) {
	good := func() authenticationv1.TokenReviewStatus {
		return authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"assay"}, User: authenticationv1.UserInfo{
			Username: agent, Extra: map[string]authenticationv1.ExtraValue{nodeName: {"node-1"}, podUID: {"u-1"}}}}
	}
	for name, c := range map[string]struct {
		token  string
		change func(s *authenticationv1.TokenReviewStatus)
		code   int
		want   Holder
		kind   assay.Kind
		unread bool // the API server is not asked
		others bool // pods speak for themselves
	}{
		"good":                    {want: Holder{Node: "node-1", Pod: "u-1"}},
		"bound to no node":        {change: func(s *authenticationv1.TokenReviewStatus) { delete(s.User.Extra, nodeName) }, want: Holder{Pod: "u-1"}},
		"bound to nothing":        {change: func(s *authenticationv1.TokenReviewStatus) { s.User.Extra = nil }},
		"bound to two nodes":      {change: func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[nodeName] = []string{"a", "b"} }, kind: assay.Denied},
		"not authenticated":       {change: func(s *authenticationv1.TokenReviewStatus) { s.Authenticated = false }, kind: assay.Denied},
		"another audience":        {change: func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"api"} }, kind: assay.Denied},
		"no audience":             {change: func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }, kind: assay.Denied},
		"another account":         {change: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = agent + "2" }, kind: assay.Denied},
		"not allowed to ask":      {code: http.StatusForbidden, kind: assay.Unavailable},
		"broken":                  {code: http.StatusInternalServerError, kind: assay.Unavailable},
		"no token":                {token: "x", kind: assay.Denied, unread: true},
		"not JSON":                {token: "a.!.c", kind: assay.Denied, unread: true},
		"says another account":    {token: token("system:serviceaccount:default:default", "assay"), kind: assay.Denied, unread: true},
		"says another audience":   {token: token(agent, "https://kubernetes.default.svc"), kind: assay.Denied, unread: true},
		"an agent's among others": {others: true, want: Holder{Node: "node-1", Pod: "u-1"}},
		"a pod's own": {others: true, token: token(pod, "assay"), change: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = pod },
			want: Holder{Node: "node-1", Pod: "u-1", Account: "shop/web"}},
		"a pod's own that says it is the agent's": {others: true, change: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = pod }, kind: assay.Denied},
		"a pod's own, bound to none": {others: true, token: token(pod, "assay"), kind: assay.Denied,
			change: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = pod; delete(s.User.Extra, podUID) }},
		"a person's":                       {others: true, token: token("admin", "assay"), kind: assay.Denied, unread: true},
		"a pod's own for another audience": {others: true, token: token(pod, "api"), kind: assay.Denied, unread: true},
		"says what is very long":           {token: token(strings.Repeat("x", 10_000), "assay"), kind: assay.Denied, unread: true},
	} {
		t.Run(name, func(t *testing.T) {
			asked := atomic.Int32{}
			server := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
				asked.Add(1)
				var review authenticationv1.TokenReview
				if err := json.NewDecoder(in.Body).Decode(&review); err != nil || in.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || len(review.Spec.Audiences) != 1 {
					t.Errorf("asked %s %+v, %v", in.URL, review, err)
				}
				out.Header().Set("Content-Type", "application/json")
				if c.code != 0 {
					out.WriteHeader(c.code)
					fmt.Fprint(out, `{"kind":"Status","apiVersion":"v1","status":"Failure"}`)
					return
				}
				review.Status = good()
				if c.change != nil {
					c.change(&review.Status)
				}
				json.NewEncoder(out).Encode(review)
			}))
			defer server.Close()
			r, err := New(&rest.Config{Host: server.URL}, "assay", "assay-system", "assay-agent")
			if err != nil {
				t.Fatal(err)
			}
			if c.others {
				r.Others()
			}
			shown := c.token
			if shown == "" {
				shown = token(agent, "assay")
			}
			got, err := r.Review(t.Context(), shown)
			if got != c.want || (c.kind == assay.Internal) != (err == nil) || err != nil && assay.KindOf(err) != c.kind {
				t.Errorf("%+v, %v", got, err)
			}
			if c.unread != (asked.Load() == 0) {
				t.Errorf("the API server was asked %d times", asked.Load())
			}
			if err != nil && (strings.Contains(err.Error(), shown) || len(err.Error()) > 600) {
				t.Errorf("the error tells too much: %v", err)
			}
		})
	}
}
