package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"assay.dev"
)

// maxBlob bounds an index or a manifest: registries take 4 MiB.
const maxBlob = 4 << 20

// maxNested bounds indexes in indexes.
const maxNested = 4

// image finds out what the runtime's ID of an image stands for.
func (r *Runtime) image(ctx context.Context, id string) (Image, error) {
	r.mu.Lock()
	img, ok := r.known[id]
	r.mu.Unlock()
	if ok {
		return img, nil
	}
	answer, err := r.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: id}})
	if err != nil {
		return Image{}, r.failed("look at image "+id, err)
	}
	img.Name = id
	if tags := answer.GetImage().GetRepoTags(); len(tags) > 0 {
		img.Name = tags[0]
	}
	if img.Config, err = configOf(answer.GetImage().GetId(), id); err != nil {
		return Image{Name: img.Name, Unknown: err.Error()}, nil
	}
	img.Manifest, img.Index, err = r.manifest(ctx, img.Config, answer.GetImage().GetRepoDigests())
	if err != nil && (ctx.Err() != nil || status.Code(err) == codes.Unavailable) {
		return Image{}, r.failed("read image "+id, err)
	}
	if err != nil {
		img.Unknown = err.Error()
		return img, nil // and asked again: it may come
	}
	r.mu.Lock()
	r.known[id] = img
	r.mu.Unlock()
	return img, nil
}

// configOf is the image's ID, which some runtimes give without the algorithm. An image
// that is not there any more (nothing forbids to remove one that runs) has it in the
// container alone.
func configOf(id, ref string) (assay.Digest, error) {
	for _, s := range []string{id, ref} {
		if len(s) == 64 {
			s = "sha256:" + s
		}
		if d, err := assay.ParseDigest(s); err == nil {
			return d, nil
		}
	}
	return "", fmt.Errorf("the runtime's ID of the image is %q, which is no digest", ref)
}

// blob is what is read of an index and of a manifest (image-spec v1.1; Docker's are the
// same in these fields).
type blob struct {
	Manifests []struct {
		Digest   string
		Platform *struct{ OS string }
	}
	Config *struct{ Digest string }
}

// manifest finds the manifest with the given configuration among what the image is known
// by, and the index that has it.
func (r *Runtime) manifest(ctx context.Context, config assay.Digest, names []string) (manifest, index assay.Digest, err error) {
	err = errors.New("the runtime knows no digest of the image's manifest: it was imported without one")
	for _, name := range names {
		_, text, _ := strings.Cut(name, "@")
		d, parsed := assay.ParseDigest(text)
		if parsed != nil {
			continue
		}
		var found assay.Digest
		if found, index, err = r.search(ctx, d, config, 0); err != nil || found != "" {
			return found, index, err
		}
		err = fmt.Errorf("no manifest of %s in the runtime's store has the configuration %s", d, config)
	}
	return "", "", err
}

// search looks for the manifest in what d names. A manifest of another platform need not
// be in the store.
func (r *Runtime) search(ctx context.Context, d, config assay.Digest, depth int) (manifest, index assay.Digest, err error) {
	b, err := r.read(ctx, d)
	if err != nil {
		return "", "", err
	}
	if b.Config != nil {
		if b.Config.Digest == string(config) {
			return d, "", nil
		}
		return "", "", nil
	}
	if depth == maxNested {
		return "", "", errors.New("its indexes are nested too deep")
	}
	var missing error
	for _, m := range b.Manifests {
		inner, parsed := assay.ParseDigest(m.Digest)
		if parsed != nil || m.Platform != nil && m.Platform.OS == "unknown" { // an attestation
			continue
		}
		found, _, err := r.search(ctx, inner, config, depth+1)
		if found != "" {
			return found, d, nil
		}
		if err != nil && status.Code(err) != codes.NotFound {
			missing = err
		}
	}
	return "", "", missing
}

// read returns a blob of the runtime's store. Its digest is computed: the store's word is
// not taken for it.
func (r *Runtime) read(ctx context.Context, d assay.Digest) (*blob, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "k8s.io"))
	defer cancel()
	stream, err := r.content.Read(ctx, &contentapi.ReadContentRequest{Digest: string(d)})
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if status.Code(err) == codes.Unimplemented {
			return nil, errors.New("the runtime gives no access to manifests: it is not containerd")
		}
		if err != nil {
			return nil, err
		}
		if all = append(all, part.GetData()...); len(all) > maxBlob {
			return nil, fmt.Errorf("%s: %w", d, errTooLarge)
		}
	}
	if got := assay.DigestOf(all); got != d {
		return nil, fmt.Errorf("the runtime's store has other content under %s: its digest is %s", d, got)
	}
	var b blob
	if err := json.Unmarshal(all, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	return &b, nil
}
