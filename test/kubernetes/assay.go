package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Images that LoadAssay gives to nodes.
const (
	AssayImage = "assay.test/assay:dev"
	EchoImage  = "assay.test/echo:dev"
)

// Assay is the image of the mesh, from the folder with both programs.
func Assay(name, programs string) Image {
	return Image{
		Name: name,
		Files: map[string]File{
			"/usr/local/bin/assay":       {From: filepath.Join(programs, "assay")},
			"/usr/local/bin/assay-proxy": {From: filepath.Join(programs, "assay-proxy")},
		},
		Entrypoint: []string{"/usr/local/bin/assay"},
		Env:        []string{"PATH=/usr/local/bin"},
	}
}

// LoadAssay compiles the mesh, and a program to try it with, and gives their images to
// every node.
func (c *Cluster) LoadAssay(ctx context.Context) error {
	c.log("compiling assay and the images of it")
	repo, err := repository(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "assay-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+"/", "./cmd/assay", "./cmd/assay-proxy", "./test/kubernetes/echo")
	build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("compile assay: %w\n%s", err, strings.TrimSpace(string(out)))
	}
	_, err = c.TryImport(ctx, Assay(AssayImage, dir))
	_, err2 := c.TryImport(ctx, Image{
		Name: EchoImage, Files: map[string]File{"/bin/echo": {From: filepath.Join(dir, "echo")}}, Entrypoint: []string{"/bin/echo"}, User: "65532:65532",
	})
	return errors.Join(err, err2)
}
