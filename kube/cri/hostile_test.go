package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"assay.dev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// store is a runtime whose images' makers, or the runtime itself, mean harm.
type store struct {
	contentapi.UnimplementedContentServer
	runtimeapi.UnimplementedImageServiceServer
	blobs map[assay.Digest]func(contentapi.Content_ReadServer) error
	names []string // digests by which the image is known
	id    string   // of the image
	reads atomic.Int64
	sent  atomic.Int64 // bytes
}

func (s *store) ImageStatus(context.Context, *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: s.id, RepoTags: []string{"shop:1"}, RepoDigests: s.names}}, nil
}

func (s *store) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	s.reads.Add(1)
	send := s.blobs[assay.Digest(req.GetDigest())]
	if send == nil {
		return status.Error(codes.NotFound, "no such content")
	}
	return send(stream)
}

// put stores b under its digest, or under another.
func (s *store) put(b []byte, as ...assay.Digest) assay.Digest {
	d := assay.DigestOf(b)
	if len(as) > 0 {
		d = as[0]
	}
	s.blobs[d] = func(stream contentapi.Content_ReadServer) error {
		return s.send(stream, b)
	}
	return d
}

func (s *store) send(stream contentapi.Content_ReadServer, b []byte) error {
	s.sent.Add(int64(len(b)))
	return stream.Send(&contentapi.ReadContentResponse{Data: b})
}

const (
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
)

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

type object = map[string]any

func config(text string) assay.Digest { return assay.DigestOf([]byte(text)) }

// manifestOf makes a manifest with a configuration.
func manifestOf(config assay.Digest) []byte {
	return encode(object{"schemaVersion": 2, "mediaType": ociManifest, "config": object{"digest": config, "size": 200 << 20}, "layers": []object{}})
}

func indexOf(list ...object) []byte {
	return encode(object{"schemaVersion": 2, "mediaType": ociIndex, "manifests": list})
}

func listed(d assay.Digest, b []byte) object {
	return object{"mediaType": ociManifest, "digest": d, "size": len(b), "platform": object{"os": "linux", "architecture": "amd64"}}
}

// serve starts s and returns the runtime as its clients see it.
func (s *store) serve(t *testing.T) *Runtime {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	contentapi.RegisterContentServer(server, s)
	runtimeapi.RegisterImageServiceServer(server, s)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-ended })
	r, err := Open(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func newStore() *store {
	s := &store{blobs: map[assay.Digest]func(contentapi.Content_ReadServer) error{}}
	s.id = string(config("ours"))
	return s
}

// named makes d what the image is known by.
func (s *store) named(d assay.Digest) { s.names = append(s.names, "shop@"+string(d)) }

// TestImage: among platforms, attestations and what is not in the store, the manifest
// with the configuration that runs is found.
func TestImage(t *testing.T) {
	s := newStore()
	ours, other := manifestOf(config("ours")), manifestOf(config("other"))
	index := indexOf(
		listed(config("not here"), other),
		listed(s.put(other), other),
		object{"digest": config("attestation"), "platform": object{"os": "unknown"}},
		listed(s.put(ours), ours),
	)
	s.named(s.put(index))
	img, err := s.serve(t).image(t.Context(), s.id)
	want := Image{Name: "shop:1", Config: config("ours"), Manifest: assay.DigestOf(ours), Index: assay.DigestOf(index)}
	if err != nil || img != want {
		t.Errorf("%+v, %v, want %+v", img, err, want)
	}
}

// TestNamedTwice: an image that is known by its manifest's digest and by an index's is contained in
// that index, whatever comes first; nothing that is there beside them changes what it is.
func TestNamedTwice(t *testing.T) {
	ours := manifestOf(config("ours"))
	index := indexOf(listed(assay.DigestOf(ours), ours))
	foreign := manifestOf(config("other"))
	want := Image{Name: "shop:1", Config: config("ours"), Manifest: assay.DigestOf(ours), Index: assay.DigestOf(index)}
	plain := want
	plain.Index = ""
	for name, c := range map[string]struct {
		blobs [][]byte
		want  Image
	}{
		"manifest":                          {[][]byte{ours}, plain},
		"manifest, index":                   {[][]byte{ours, index}, want},
		"index, manifest":                   {[][]byte{index, ours}, want},
		"manifest, other, nonsense, index":  {[][]byte{ours, foreign, []byte("nonsense"), index}, want},
		"manifest, index of another":        {[][]byte{ours, indexOf(listed(assay.DigestOf(foreign), foreign))}, plain},
		"manifest, another of its manifest": {[][]byte{ours, append(ours, ' '), indexOf(object{"digest": assay.DigestOf(append(ours, ' '))})}, plain},
	} {
		s := newStore()
		s.put(ours)
		for _, b := range c.blobs {
			s.named(s.put(b))
		}
		if img, err := s.serve(t).image(t.Context(), s.id); err != nil || img != c.want {
			t.Errorf("%s: %+v, %v, want %+v", name, img, err, c.want)
		}
	}
	s := newStore()
	s.named(s.put(ours))
	away := config("away")
	s.named(away)
	s.blobs[away] = func(contentapi.Content_ReadServer) error { return status.Error(codes.Unavailable, "") }
	if img, err := s.serve(t).image(t.Context(), s.id); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("while the store is away: %+v, %v", img, err)
	}
}

// TestHostileContent: whatever is in the store, nothing is attested that was not proven,
// little is read for it, and it is said why.
func TestHostileContent(t *testing.T) {
	ours := manifestOf(config("ours"))
	tests := []struct {
		name  string
		make  func(s *store)
		why   string // "": found
		reads int64  // at most
	}{
		{"an index that lists itself", func(s *store) {
			self := config("a digest that is not this index's")
			s.named(s.put(indexOf(object{"mediaType": ociIndex, "digest": self}), self))
		}, "has other content under", 1},
		{"other content under the manifest's digest", func(s *store) {
			other := manifestOf(config("not ours"))
			d := s.put(ours, assay.DigestOf(other))
			s.named(s.put(indexOf(object{"digest": d})))
		}, "has other content under", 2},
		{"ten thousand manifests", func(s *store) {
			var list []object
			for i := range 10_000 {
				list = append(list, object{"digest": config(fmt.Sprint(i))})
			}
			s.named(s.put(indexOf(list...)))
		}, "lists 10000 manifests, at most 256", 1},
		{"indexes that fan out", func(s *store) {
			var list []object
			for i := range 200 {
				var inner []object
				for j := range 200 {
					inner = append(inner, object{"digest": config(fmt.Sprint(i, j))})
				}
				b := indexOf(inner...)
				list = append(list, object{"digest": s.put(b)})
			}
			s.named(s.put(indexOf(list...)))
		}, "more than 256 manifests", maxReads},
		{"the same index again and again", func(s *store) {
			b := indexOf()
			for range 5 {
				var list []object
				for range maxManifests {
					list = append(list, object{"digest": s.put(b)})
				}
				b = indexOf(list...)
			}
			s.named(s.put(b))
		}, "more than 256 manifests", maxReads},
		{"thousands of names", func(s *store) {
			for i := range 10_000 {
				s.named(s.put(manifestOf(config(fmt.Sprint(i)))))
			}
		}, "more than 256 manifests", maxReads},
		{"nested too deep", func(s *store) {
			b := ours
			for range maxNested + 2 {
				b = indexOf(object{"digest": s.put(b)})
			}
			s.named(s.put(b))
		}, "nested deeper than 4", maxNested + 1},
		{"a size that lies", func(s *store) {
			entry := listed(s.put(ours), ours)
			entry["size"] = len(ours) + 1
			s.named(s.put(indexOf(entry)))
		}, fmt.Sprintf("has %d bytes, and the index that lists it says %d", len(ours), len(ours)+1), 2},
		{"a media type in the index that lies", func(s *store) {
			entry := listed(s.put(ours), ours)
			entry["mediaType"] = ociIndex
			s.named(s.put(indexOf(entry)))
		}, "and the index that lists it says", 2},
		{"a manifest that says it is an index", func(s *store) {
			s.named(s.put(encode(object{"mediaType": ociIndex, "config": object{"digest": config("ours")}})))
		}, "is not what its media type says", 1},
		{"an index that says it is a manifest", func(s *store) {
			s.named(s.put(encode(object{"mediaType": ociManifest, "manifests": []object{{"digest": s.put(ours)}}})))
		}, "is not what its media type says", 1},
		{"an index and a manifest at once", func(s *store) {
			s.named(s.put(encode(object{"config": object{"digest": config("ours")}, "manifests": []object{}})))
		}, "is an index and a manifest at once", 1},
		{"neither", func(s *store) { s.named(s.put([]byte(`{}`))) }, "is neither an index nor a manifest", 1},
		{"no JSON", func(s *store) { s.named(s.put([]byte("\x1f\x8b"))) }, "invalid character", 1},
		{"nothing", func(s *store) { s.named(s.put(nil)) }, "unexpected end of JSON", 1},
		{"a manifest of 200 MB", func(s *store) {
			d := config("large")
			part := []byte(strings.Repeat(" ", 1<<20))
			s.blobs[d] = func(stream contentapi.Content_ReadServer) error {
				for range 200 {
					if err := s.send(stream, part); err != nil {
						return err
					}
				}
				return nil
			}
			s.named(d)
		}, "larger than 4 MiB", 1},
		{"large manifests, many", func(s *store) {
			var list []object
			for i := range 100 {
				b := append(manifestOf(config(fmt.Sprint(i))), strings.Repeat(" ", 3<<20)...)
				list = append(list, object{"digest": s.put(b)})
			}
			s.named(s.put(indexOf(list...)))
		}, "or 64 MiB of them", 23},
		{"empty parts for ever", func(s *store) {
			d := config("endless")
			s.blobs[d] = func(stream contentapi.Content_ReadServer) error {
				for {
					if err := stream.Send(&contentapi.ReadContentResponse{}); err != nil {
						return err
					}
				}
			}
			s.named(d)
		}, "in more than 4096 parts", 1},
		{"a configuration of 200 MB, which nobody reads", func(s *store) { s.named(s.put(ours)) }, "", 1},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			s := newStore()
			c.make(s)
			img, err := s.serve(t).image(t.Context(), s.id)
			if err != nil {
				t.Fatal(err)
			}
			if found := img.Manifest != ""; found != (c.why == "") || !strings.Contains(img.Unknown, c.why) {
				t.Errorf("manifest %q, unknown because %q, want %q", img.Manifest, img.Unknown, c.why)
			}
			if img.Config != config("ours") {
				t.Errorf("configuration %s", img.Config)
			}
			if n := s.reads.Load(); n > c.reads {
				t.Errorf("%d blobs were read, want at most %d", n, c.reads)
			}
			if n := s.sent.Load(); n > maxBytes+16<<20 {
				t.Errorf("%d bytes were sent", n)
			}
		})
	}
}

// TestStoreThatHangs: an image that cannot be read now is no image without a manifest.
func TestStoreThatHangs(t *testing.T) {
	s := newStore()
	d := config("hangs")
	asked := make(chan struct{})
	s.blobs[d] = func(stream contentapi.Content_ReadServer) error {
		close(asked)
		<-stream.Context().Done()
		return nil
	}
	s.named(d)
	r := s.serve(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if img, err := r.image(ctx, s.id); err == nil {
		t.Errorf("%+v", img)
	}
	s.blobs[d] = func(contentapi.Content_ReadServer) error {
		return status.Error(codes.DeadlineExceeded, "")
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if img, err := r.image(ctx, s.id); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("%+v, %v", img, err)
	}
}
