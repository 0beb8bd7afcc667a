package publish

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// The Secret of the key under which a shared authority is sealed. The installation has made
// it, empty; the first control fills it.
const (
	AuthorityName = "assay-authority"
	AuthorityKey  = "sealing.key"
)

// SealingKey returns the key in a namespace's Secret. In an empty one it puts what fresh
// makes, if nobody else is first.
func SealingKey(ctx context.Context, config *rest.Config, namespace, name string, fresh func() string) ([]byte, error) {
	op := "read Secret " + namespace + "/" + name
	client, err := coreClient(config)
	if err != nil {
		return nil, err
	}
	for range conflicts {
		var s corev1.Secret
		err := client.Get().Namespace(namespace).Resource("secrets").Name(name).Do(ctx).Into(&s)
		if apierrors.IsNotFound(err) {
			return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "it is part of an installation with a shared store: assay install --store-secret NAME"}
		}
		if err != nil {
			return nil, &assay.Error{Kind: assay.Unavailable, Op: op, Err: err, Remedy: "see that control reaches the API server, and may get and update this Secret"}
		}
		if key := s.Data[AuthorityKey]; len(key) > 0 {
			return key, nil
		}
		if s.Data == nil {
			s.Data = map[string][]byte{}
		}
		s.Data[AuthorityKey] = []byte(fresh())
		// With the version that was read: of two that fill it one is refused.
		err = client.Put().Namespace(namespace).Resource("secrets").Name(name).Body(&s).Do(ctx).Error()
		if err != nil && !apierrors.IsConflict(err) {
			return nil, &assay.Error{Kind: assay.Unavailable, Op: "fill Secret " + namespace + "/" + name, Err: err, Remedy: "see that control reaches the API server, and may get and update this Secret"}
		}
	}
	return nil, &assay.Error{Kind: assay.Unavailable, Op: "fill Secret " + namespace + "/" + name, Err: errors.New("others keep changing it"), Remedy: fmt.Sprintf("put a key into it by hand, as %s: 32 random bytes in base64", AuthorityKey)}
}
