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
	// NextImage is AssayImage of another version, for LoadNext.
	NextImage = "assay.test/assay:next"
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
	dir, err := compileAssay(ctx, "dev", "./cmd/assay", "./cmd/assay-proxy", "./test/kubernetes/echo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	_, err = c.TryImport(ctx, Assay(AssayImage, dir))
	_, err2 := c.TryImport(ctx, Image{
		Name: EchoImage, Files: map[string]File{"/bin/echo": {From: filepath.Join(dir, "echo")}}, Entrypoint: []string{"/bin/echo"}, User: "65532:65532",
	})
	return errors.Join(err, err2)
}

// LoadNext gives NextImage to every node: what LoadAssay does, as programs that differ.
func (c *Cluster) LoadNext(ctx context.Context) error {
	dir, err := compileAssay(ctx, "next", "./cmd/assay", "./cmd/assay-proxy")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	_, err = c.TryImport(ctx, Assay(NextImage, dir))
	return err
}

// compileAssay compiles commands of this repository into a new folder.
func compileAssay(ctx context.Context, version string, packages ...string) (dir string, err error) {
	repo, err := repository(ctx)
	if err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp("", "assay-images-"); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-ldflags", "-X main.version=" + version, "-o", dir + "/"}, packages...)...)
	build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("compile assay: %w\n%s", err, strings.TrimSpace(string(out))), os.RemoveAll(dir))
	}
	return dir, nil
}
