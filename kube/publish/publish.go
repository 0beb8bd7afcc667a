// Package publish writes to an API server what others read there: the roots of the mesh's
// authority (ConfigMap assay-trust, by which agents know control, and the configuration
// assay-injector, by which the API server does), what became of routes
// (their status, as the Gateway API has it) and of objects of our own kinds (their condition
// Accepted, and events), what was found about pods (events), and once the key under which several controls share an authority (Secret assay-authority).
//
// It changes nothing else, and nobody else's: of a ConfigMap and a Secret one key, of a webhook its roots, of a route's
// status the entries of our controller name, of our own kinds' the condition Accepted, events that it has made. It writes only what differs
// from what is there, a bounded number of times in a second, so several controls that say the same
// write it once. What somebody else changes is written again, ever more seldom while he does: two
// that do not say the same, as two releases may, cost the API server a few writes in an hour.
//
// Goroutines: each Run blocks and starts none. LocalRules, Rules and InjectorRules are all that it must be
// allowed.
//
// Tour: publish.go, trust.go, injector.go, authority.go, pace.go, routes.go, objects.go, events.go.
package publish

import (
	"context"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/client-go/rest"

	"assay.dev/kube/apiserver"
	"assay.dev/kube/v1alpha1"
)

// Rules is what Routes, Objects and Events must be allowed in every namespace.
func Rules() []rbacv1.PolicyRule {
	const group = "gateway.networking.k8s.io"
	return []rbacv1.PolicyRule{
		{APIGroups: []string{group}, Resources: []string{"httproutes", "grpcroutes", "tlsroutes"}, Verbs: []string{"get"}},
		{APIGroups: []string{group}, Resources: []string{"httproutes/status", "grpcroutes/status", "tlsroutes/status"}, Verbs: []string{"update"}},
		{APIGroups: []string{v1alpha1.Group}, Resources: []string{"meshconfigs/status", "egresses/status", "trafficpolicies/status"}, Verbs: []string{"patch"}},
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	}
}

// LocalRules is what Trust and SealingKey must be allowed in the mesh's own namespace.
func LocalRules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{TrustName}, Verbs: []string{"get", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{AuthorityName}, Verbs: []string{"get", "update"}},
	}
}

// coreClient returns a client of the API's core.
func coreClient(config *rest.Config) (rest.Interface, error) {
	config = rest.CopyConfig(config)
	config.Timeout = within
	return apiserver.Client(config, corev1.SchemeGroupVersion, apiserver.JSON, corev1.AddToScheme)
}

// within bounds one request.
const within = 10 * time.Second

// said tells a problem when it begins and when it ends, and not in between.
type said struct {
	log  *slog.Logger
	what string
	now  bool
}

func (s *said) result(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
	case err != nil && !s.now:
		s.log.Error(s.what+": cannot be written", "err", err)
	case err == nil && s.now:
		s.log.Info(s.what + ": is written again")
	}
	s.now = err != nil
}
