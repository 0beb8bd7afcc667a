// Package review asks an API server whose a service account's token is (TokenReview,
// authentication.k8s.io/v1).
//
// A token is taken when the API server says that it is genuine, made for our audience, and
// of the one service account that agents have, or, where pods speak for themselves, bound to a
// pod of any other. It says then to which node and pod it is
// bound. What the token says of itself is read once, to refuse at no cost what cannot be
// meant for us, and never believed.
//
// It decides nothing else, keeps no token, and starts no goroutine. Rules is all that it
// must be allowed.
package review

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/rest"

	"assay.dev"

	"assay.dev/kube/apiserver"
)

// Rules is what a Reviewer must be allowed.
func Rules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}}}
}

// Reviewer reviews tokens of one service account, or of all. It is safe for concurrent use.
type Reviewer struct {
	client   rest.Interface
	user     string
	audience string
	others   bool
}

// Holder is who holds a token: a pod's, on a node. Either may be "" where the token is not
// bound to one, or the API server is too old to say.
type Holder struct {
	Node string // its name
	Pod  string // its UID
	// Account is the pod's, "NAMESPACE/NAME", when it is not that of the agents; such a holder
	// has a pod.
	Account string
}

// within bounds one review.
const within = 10 * time.Second

// The API server says more of a token's holder under these names.
const (
	nodeName = "authentication.kubernetes.io/node-name"
	podUID   = "authentication.kubernetes.io/pod-uid"
)

// New returns a Reviewer for tokens of namespace's service account that are made for
// audience. It does not connect yet.
func New(config *rest.Config, audience, namespace, account string) (*Reviewer, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = 50, 200 // nodes come all at once after a failure of power, strangers at any time
	config.Timeout = within
	client, err := apiserver.Client(config, authenticationv1.SchemeGroupVersion, apiserver.JSON, authenticationv1.AddToScheme)
	if err != nil {
		return nil, err
	}
	return &Reviewer{client: client, audience: audience, user: accounts + namespace + ":" + account}, nil
}

// Others has it take the tokens of pods of other service accounts, too. It comes before Review.
func (r *Reviewer) Others() { r.others = true }

// accounts begins the user of every service account.
const accounts = "system:serviceaccount:"

// Review asks about a token. Denied: it is not one of ours; Unavailable: the API server did
// not say.
func (r *Reviewer) Review(ctx context.Context, token string) (Holder, error) {
	deny := func(format string, args ...any) (Holder, error) {
		return Holder{}, &assay.Error{Kind: assay.Denied, Op: "review a token", Err: fmt.Errorf(format, args...),
			Remedy: "mount a projected token of " + r.user + " with the audience " + r.audience}
	}
	said, err := read(token)
	if err != nil {
		return deny("%w", err)
	}
	if said.Subject != r.user && !(r.others && strings.HasPrefix(said.Subject, accounts)) || !slices.Contains(said.Audience, r.audience) {
		return deny("it is that of %q for %q", short(said.Subject), short(strings.Join(said.Audience, " ")))
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	ask := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{r.audience}}}
	var answer authenticationv1.TokenReview
	if err := r.client.Post().Resource("tokenreviews").Body(ask).Do(ctx).Into(&answer); err != nil {
		return Holder{}, &assay.Error{Kind: assay.Unavailable, Op: "review a token", Err: err, Remedy: "try again; see that control reaches the API server and may create tokenreviews"}
	}
	s := &answer.Status
	switch {
	case !s.Authenticated:
		return deny("the API server does not take it: %s", short(s.Error))
	case !slices.Contains(s.Audiences, r.audience):
		// Nor is it ours when the server does not know what an audience is.
		return deny("the API server takes it for %q", short(strings.Join(s.Audiences, " ")))
	case s.User.Username != said.Subject:
		return deny("the API server says that it is that of %q", short(s.User.Username))
	}
	var h Holder
	for name, to := range map[string]*string{nodeName: &h.Node, podUID: &h.Pod} {
		switch list := s.User.Extra[name]; len(list) {
		case 0:
		case 1:
			*to = list[0]
		default:
			return deny("it is bound to several: %s %q", name, list)
		}
	}
	if s.User.Username == r.user {
		return h, nil
	}
	namespace, name, ok := strings.Cut(strings.TrimPrefix(s.User.Username, accounts), ":")
	if !ok || h.Pod == "" {
		return deny("it is that of %q, and bound to no pod", short(s.User.Username))
	}
	h.Account = namespace + "/" + name
	return h, nil
}

// claims are what a token says of itself (RFC 7519).
type claims struct {
	Subject  string   `json:"sub"`
	Audience audience `json:"aud"`
}

// audience is one or several.
type audience []string

func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

func read(token string) (c claims, err error) {
	part := strings.Split(token, ".")
	if len(part) != 3 {
		return c, errors.New("it is no service account's token")
	}
	payload, err := base64.RawURLEncoding.DecodeString(part[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	if err != nil {
		return c, errors.New("it is no service account's token") // a cause would quote it
	}
	return c, nil
}

func short(s string) string {
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}
