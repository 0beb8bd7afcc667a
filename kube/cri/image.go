package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"assay.dev"
)

// What is read of the runtime's store to find one image's manifest is bounded: whoever
// made the image chose what is in there. Indexes of the widest official images have some
// thirty manifests and as many attestations.
const (
	maxBlob      = 4 << 20 // an index or a manifest: registries take 4 MiB
	maxManifests = 256     // that one index lists
	maxReads     = 256     // blobs in all
	maxBytes     = 64 << 20
	maxNested    = 4    // indexes in indexes
	maxParts     = 4096 // in which a blob comes; containerd's are of 32 KiB and more
	searchTime   = 20 * time.Second
)

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
	if isAway(err) {
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
	MediaType string
	Manifests []descriptor
	Config    *descriptor
}

type descriptor struct {
	MediaType string
	Digest    string
	Size      int64
	Platform  *struct{ OS string }
}

// manifest finds the manifest with the given configuration among what the image is known
// by, and an index that has it: an image that was pulled by its manifest's digest and by a
// tag is known by both.
func (r *Runtime) manifest(ctx context.Context, config assay.Digest, names []string) (manifest, index assay.Digest, err error) {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "containerd-namespace", "k8s.io"), searchTime)
	defer cancel()
	s := search{content: r.content, config: config}
	err = errors.New("the runtime knows no digest of the image's manifest: it was imported without one")
	for _, name := range names {
		_, text, _ := strings.Cut(name, "@")
		d, parsed := assay.ParseDigest(text)
		if parsed != nil {
			continue
		}
		found, within, problem := s.in(ctx, descriptor{Digest: string(d)}, 0)
		switch {
		case manifest != "" && (isAway(problem) || found == manifest && within != ""):
			return manifest, within, problem
		case manifest != "": // that one is proven, whatever else is in the store
		case problem != nil || within != "":
			return found, within, problem
		case found != "":
			manifest, err = found, nil
		default:
			err = fmt.Errorf("no manifest of %s in the runtime's store has the configuration %s", d, config)
		}
	}
	return manifest, "", err
}

// isAway reports whether the runtime has not answered, so that it is to be asked again.
func isAway(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.Canceled
}

// search looks for the manifest of one configuration.
type search struct {
	content contentapi.ContentClient
	config  assay.Digest
	reads   int // so far
	bytes   int
}

// in looks in what d describes. A manifest of another platform need not be in the store.
func (s *search) in(ctx context.Context, d descriptor, depth int) (manifest, index assay.Digest, err error) {
	digest, err := assay.ParseDigest(d.Digest)
	if err != nil {
		return "", "", nil
	}
	b, err := s.read(ctx, digest, d)
	if err != nil {
		return "", "", err
	}
	if b.Config != nil {
		if b.Config.Digest == string(s.config) {
			return digest, "", nil
		}
		return "", "", nil
	}
	if depth == maxNested {
		return "", "", fmt.Errorf("%s: its indexes are nested deeper than %d", digest, maxNested)
	}
	var missing error
	for _, m := range b.Manifests {
		if m.Platform != nil && m.Platform.OS == "unknown" { // an attestation
			continue
		}
		found, _, err := s.in(ctx, m, depth+1)
		if found != "" {
			return found, digest, nil
		}
		if errors.Is(err, errTooMuch) || ctx.Err() != nil {
			return "", "", err
		}
		if err != nil && status.Code(err) != codes.NotFound {
			missing = err
		}
	}
	return "", "", missing
}

var errTooMuch = fmt.Errorf("more than %d manifests, or %d MiB of them, would have to be read for one image", maxReads, maxBytes>>20)

// read returns a blob that can be read in one way only.
func (s *search) read(ctx context.Context, digest assay.Digest, d descriptor) (*blob, error) {
	if s.reads++; s.reads > maxReads {
		return nil, errTooMuch
	}
	all, err := s.fetch(ctx, digest)
	if err != nil {
		return nil, err
	}
	if d.Size != 0 && d.Size != int64(len(all)) {
		return nil, fmt.Errorf("%s has %d bytes, and the index that lists it says %d", digest, len(all), d.Size)
	}
	var b blob
	if err := json.Unmarshal(all, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", digest, err)
	}
	if err := b.check(d.MediaType); err != nil {
		return nil, fmt.Errorf("%s %w", digest, err)
	}
	return &b, nil
}

// check refuses what a runtime might read as something else than we do.
func (b *blob) check(listed string) error {
	switch isIndex := strings.Contains(b.MediaType, ".index.") || strings.Contains(b.MediaType, ".manifest.list."); {
	case b.Config != nil && b.Manifests != nil:
		return errors.New("is an index and a manifest at once")
	case b.Config == nil && b.Manifests == nil:
		return errors.New("is neither an index nor a manifest")
	case b.MediaType != "" && isIndex != (b.Manifests != nil):
		return fmt.Errorf("is not what its media type says: %q", b.MediaType)
	case b.MediaType != "" && listed != "" && b.MediaType != listed:
		return fmt.Errorf("has the media type %q, and the index that lists it says %q", b.MediaType, listed)
	case len(b.Manifests) > maxManifests:
		return fmt.Errorf("lists %d manifests, at most %d are looked at", len(b.Manifests), maxManifests)
	}
	return nil
}

// fetch returns a blob of the runtime's store. Its digest is computed: the store's word
// is not taken for it.
func (s *search) fetch(ctx context.Context, d assay.Digest) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.content.Read(ctx, &contentapi.ReadContentRequest{Digest: string(d)})
	if err != nil {
		return nil, err
	}
	var all []byte
	for parts := 0; ; parts++ {
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
		if parts == maxParts {
			return nil, fmt.Errorf("%s comes in more than %d parts", d, maxParts)
		}
		if s.bytes += len(part.GetData()); s.bytes > maxBytes {
			return nil, errTooMuch
		}
		if all = append(all, part.GetData()...); len(all) > maxBlob {
			return nil, fmt.Errorf("%s: %w", d, errTooLarge)
		}
	}
	if got := assay.DigestOf(all); got != d {
		return nil, fmt.Errorf("the runtime's store has other content under %s: its digest is %s", d, got)
	}
	return all, nil
}
