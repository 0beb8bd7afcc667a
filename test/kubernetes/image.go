package kubernetes

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Image is a container image to be made: one layer with the files, for this
// machine's platform and, so that its index names more than one manifest, for another
// that nobody runs.
type Image struct {
	Name       string            // with registry and tag: assay.test/echo:1
	Files      map[string]File   // by absolute path
	Entrypoint []string          //
	Env        []string          // NAME=value
	Labels     map[string]string //
	User       string            // "" is root
	Plain      bool              // its name means the manifest: no index has it
}

// File is a file in an image: a copy of one here, or a text.
type File struct {
	From string
	Text string
	Mode os.FileMode // 0 is 0755 for a copy, 0644 for a text
}

// Digests are what an image's parts are known by, each "sha256:" and hex. The
// index is what a tag points to and what a registry's digest usually is; the
// manifest is this platform's; the config's digest is the "image ID" of runtimes.
type Digests struct {
	Index, Manifest, Config, Layer string
	Other                          string // the other platform's manifest
}

// Named is what the image's name points to.
func (d Digests) Named() string { return cmp.Or(d.Index, d.Manifest) }

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

const (
	indexType    = "application/vnd.oci.image.index.v1+json"
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar"
)

// layout writes an OCI image layout as a tar (image-spec v1.1, image-layout.md).
type layout struct {
	tar     *tar.Writer
	written map[string]bool
	err     error
}

func (l *layout) file(name string, text []byte) {
	if l.err != nil || l.written[name] {
		return
	}
	l.written[name] = true
	if l.err = l.tar.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Format: tar.FormatPAX}); l.err == nil {
		_, l.err = l.tar.Write(text)
	}
}

func (l *layout) blob(mediaType string, text []byte) descriptor {
	sum := fmt.Sprintf("%x", sha256.Sum256(text))
	l.file("blobs/sha256/"+sum, text)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: int64(len(text))}
}

func (l *layout) json(mediaType string, value any) descriptor {
	text, err := json.Marshal(value)
	if err != nil {
		l.err = err
	}
	return l.blob(mediaType, text)
}

// Write writes the image as a tar that containerd, and every other tool that knows
// OCI image layouts, can import. The same image has the same digests each time.
func (img Image) Write(w io.Writer) (Digests, error) {
	layer, err := img.layer()
	if err != nil {
		return Digests{}, fmt.Errorf("image %s: %w", img.Name, err)
	}
	other := "arm64"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	l := &layout{tar: tar.NewWriter(w), written: map[string]bool{}}
	l.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	files := l.blob(layerType, layer)
	manifest, config := img.manifest(l, files, runtime.GOARCH)
	named, d := manifest, Digests{Manifest: manifest.Digest, Config: config.Digest, Layer: files.Digest}
	if !img.Plain {
		manifest2, _ := img.manifest(l, files, other)
		named = l.json(indexType, map[string]any{
			"schemaVersion": 2, "mediaType": indexType, "manifests": []descriptor{manifest, manifest2},
		})
		d.Index, d.Other = named.Digest, manifest2.Digest
	}
	named.Annotations = map[string]string{"io.containerd.image.name": img.Name}
	top, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": indexType, "manifests": []descriptor{named}})
	if err != nil {
		return Digests{}, err
	}
	l.file("index.json", top)
	if l.err == nil {
		l.err = l.tar.Close()
	}
	if l.err != nil {
		return Digests{}, fmt.Errorf("image %s: %w", img.Name, l.err)
	}
	return d, nil
}

// manifest writes the config and the manifest for a platform.
func (img Image) manifest(l *layout, layer descriptor, arch string) (manifest, config descriptor) {
	config = l.json(configType, map[string]any{
		"architecture": arch, "os": "linux",
		"config": map[string]any{"Entrypoint": img.Entrypoint, "Env": img.Env, "Labels": img.Labels, "User": img.User, "WorkingDir": "/"},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}}, // not compressed, so the same
	})
	manifest = l.json(manifestType, map[string]any{
		"schemaVersion": 2, "mediaType": manifestType, "config": config, "layers": []descriptor{layer},
	})
	manifest.Platform = &platform{arch, "linux"}
	return manifest, config
}

// layer writes the files, in the order of their names and with no time.
func (img Image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{}
	add := func(h tar.Header, text []byte) error {
		h.ModTime, h.Format = time.Unix(0, 0), tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write(text)
		return err
	}
	for _, dir := range []string{"tmp/", "etc/"} {
		mode := int64(0o755)
		if dir == "tmp/" {
			mode = 0o1777
		}
		made[dir] = true
		if err := add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: mode}, nil); err != nil {
			return nil, err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(img.Files)) {
		f, name := img.Files[path], strings.TrimPrefix(path, "/")
		text, mode := []byte(f.Text), os.FileMode(0o644)
		if f.From != "" {
			var err error
			if text, err = os.ReadFile(f.From); err != nil {
				return nil, err
			}
			mode = 0o755
		}
		if f.Mode != 0 {
			mode = f.Mode
		}
		for i, c := range name {
			if dir := name[:i+1]; c == '/' && !made[dir] {
				made[dir] = true
				if err := add(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil); err != nil {
					return nil, err
				}
			}
		}
		if err := add(tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: int64(mode.Perm()), Size: int64(len(text))}, text); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}
