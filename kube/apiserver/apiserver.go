// Package apiserver says how to reach an API server, and makes clients for single groups
// of its API: the sets of clients that client-go has for the whole API would triple what is
// linked. Of what is needed for its labels alone it asks for no more than the metadata.
// It connects to nothing, and starts no goroutine.
package apiserver

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"assay.dev"
)

// Config says how to reach the API server that a kubeconfig names; with "" it is the one of
// the cluster in whose pod this process runs. agent is who asks.
func Config(kubeconfig, agent string) (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, &assay.Error{
			Op: "read how to reach the API server " + kubeconfig, Err: err,
			Remedy: "give a kubeconfig file, or run in a pod with a service account",
		}
	}
	config.UserAgent = agent
	return config, nil
}

// Encodings of what is sent. What is received may be JSON in any case.
const (
	JSON     = runtime.ContentTypeJSON
	Protobuf = runtime.ContentTypeProtobuf // of the server's own kinds alone
)

// Client returns a client for one group of the API, of whose kinds add knows those that are
// used.
func Client(config *rest.Config, version schema.GroupVersion, encoding string, add ...func(*runtime.Scheme) error) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	for _, add := range add {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/apis", &version
	if version.Group == "" {
		config.APIPath = "/api"
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType, config.AcceptContentTypes = encoding, encoding
	if encoding != JSON {
		config.AcceptContentTypes += "," + JSON
	}
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("client of the API server %s: %w", config.Host, err)
	}
	return client, nil
}

// Metadata asks for objects without what they specify and what became of them: names, labels
// and annotations, for who needs no more. Each is a *metav1.PartialObjectMetadata.
type Metadata struct{ metadata.Getter }

// OpenMetadata returns what asks so for the objects of a resource.
func OpenMetadata(config *rest.Config, resource schema.GroupVersionResource) (Metadata, error) {
	client, err := metadata.NewForConfig(config)
	if err != nil {
		return Metadata{}, fmt.Errorf("client of the API server %s: %w", config.Host, err)
	}
	return Metadata{client.Resource(resource)}, nil
}

// Watched is what a reflector watches: all of them.
func (m Metadata) Watched() cache.ListerWatcher {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return m.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return m.Watch(ctx, o)
		},
	}
}
