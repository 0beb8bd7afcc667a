package publish

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// The ConfigMap of roots, and its key: certificates in PEM, the one that signs among them.
const (
	TrustName = "assay-trust"
	TrustKey  = "roots.pem"
)

// Trust keeps the ConfigMap of roots. The installation has made it.
type Trust struct {
	client    rest.Interface
	namespace string
	log       *slog.Logger
}

// NewTrust returns the keeper of a namespace's ConfigMap. It does not connect yet.
func NewTrust(config *rest.Config, namespace string, log *slog.Logger) (*Trust, error) {
	client, err := coreClient(config)
	if err != nil {
		return nil, err
	}
	return &Trust{client: client, namespace: namespace, log: log}, nil
}

// How often the roots are looked at, and the ConfigMap.
const (
	lookEvery  = time.Second
	checkEvery = 30 * time.Second
)

// Run keeps the ConfigMap as roots says, certificates in DER, until ctx ends. While it says
// none, nothing is written. Several controls may do so: what they say is the same.
func (t *Trust) Run(ctx context.Context, roots func() [][]byte) error {
	return keep(ctx, said{log: t.log, what: "the mesh's roots in " + t.namespace + "/" + TrustName}, roots, t.write)
}

// keep writes roots, in PEM, whenever they differ from what was written, and looks at what is
// there now and then, until ctx ends.
func keep(ctx context.Context, problem said, roots func() [][]byte, write func(context.Context, []byte) error) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var written []byte
	var checked time.Time
	for {
		text := PEM(roots())
		if len(text) > 0 && (!bytes.Equal(text, written) || time.Since(checked) >= checkEvery) {
			err := write(ctx, text)
			problem.result(ctx, err)
			if err == nil {
				written, checked = text, time.Now()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// PEM writes certificates in DER one after the other.
func PEM(roots [][]byte) []byte {
	var out bytes.Buffer
	for _, der := range roots {
		pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // into memory: it does not fail
	}
	return out.Bytes()
}

// write writes what differs.
func (t *Trust) write(ctx context.Context, text []byte) error {
	op := "write ConfigMap " + t.namespace + "/" + TrustName
	var is corev1.ConfigMap
	err := t.client.Get().Namespace(t.namespace).Resource("configmaps").Name(TrustName).Do(ctx).Into(&is)
	if apierrors.IsNotFound(err) {
		return &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "it is part of the installation: assay install"}
	}
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: err}
	}
	if is.Data[TrustKey] == string(text) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"data": map[string]string{TrustKey: string(text)}})
	if err != nil {
		return err
	}
	err = t.client.Patch(types.MergePatchType).Namespace(t.namespace).Resource("configmaps").Name(TrustName).Body(patch).Do(ctx).Error()
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: err}
	}
	t.log.Info("the mesh's roots are published", "configmap", t.namespace+"/"+TrustName, "bytes", len(text))
	return nil
}
