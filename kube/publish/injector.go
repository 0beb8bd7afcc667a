package publish

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"assay.dev"
	"assay.dev/kube/apiserver"
)

// InjectorName is the MutatingWebhookConfiguration by which the API server asks control about pods
// that are made.
const InjectorName = "assay-injector"

// InjectorRules is what Injector must be allowed in the cluster.
func InjectorRules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{{APIGroups: []string{admissionregistrationv1.GroupName}, Resources: []string{"mutatingwebhookconfigurations"},
		ResourceNames: []string{InjectorName}, Verbs: []string{"get", "patch"}}}
}

// Injector keeps the roots by which the API server knows control in that configuration. The
// installation has made it.
type Injector struct {
	client rest.Interface
	log    *slog.Logger
}

// NewInjector returns the keeper. It does not connect yet.
func NewInjector(config *rest.Config, log *slog.Logger) (*Injector, error) {
	config = rest.CopyConfig(config)
	config.Timeout = within
	client, err := apiserver.Client(config, admissionregistrationv1.SchemeGroupVersion, apiserver.JSON, admissionregistrationv1.AddToScheme)
	if err != nil {
		return nil, err
	}
	return &Injector{client: client, log: log}, nil
}

// Run keeps the roots as Trust.Run does.
func (i *Injector) Run(ctx context.Context, roots func() [][]byte) error {
	return keep(ctx, said{log: i.log, what: "the mesh's roots in " + InjectorName}, roots, i.write)
}

const configurations = "mutatingwebhookconfigurations"

// write writes what differs, and nothing but roots.
func (i *Injector) write(ctx context.Context, text []byte) error {
	const op = "write MutatingWebhookConfiguration " + InjectorName
	var is admissionregistrationv1.MutatingWebhookConfiguration
	err := i.client.Get().Resource(configurations).Name(InjectorName).Do(ctx).Into(&is)
	if apierrors.IsNotFound(err) {
		return &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "it is part of an installation with an injector: assay install --injector"}
	}
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: err}
	}
	var differ []any
	for _, w := range is.Webhooks {
		if !bytes.Equal(w.ClientConfig.CABundle, text) {
			differ = append(differ, map[string]any{"name": w.Name, "clientConfig": map[string]any{"caBundle": text}})
		}
	}
	if len(differ) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"webhooks": differ})
	if err != nil {
		return err
	}
	// By the names of webhooks; what is not mentioned stays.
	err = i.client.Patch(types.StrategicMergePatchType).Resource(configurations).Name(InjectorName).Body(patch).Do(ctx).Error()
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: err}
	}
	i.log.Info("the API server knows by which roots to ask about pods", "configuration", InjectorName, "webhooks", len(differ))
	return nil
}
