package kubernetes

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// parts are the programs of a cluster that Debian does not have: compiled here,
// from the module test/kubernetes/parts, and kept in the user's cache under a name
// that tells the version and everything that decides the result.
type parts struct {
	dir     string
	version string        // of Kubernetes, with the v
	built   time.Duration // 0 when they were there
}

func (p *parts) path(name string) string { return filepath.Join(p.dir, name) }

// cacheFolder holds the programs and the clusters.
func cacheFolder() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("assay-%d", os.Getuid()))
	}
	dir = filepath.Join(dir, "assay", "kubernetes")
	return dir, os.MkdirAll(dir, 0o755)
}

// repository is the folder of the module assay.dev.
func repository(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "assay.dev").Output()
	if err != nil {
		return "", fmt.Errorf("find the sources of Kubernetes' parts: %w: run it inside Assay's repository, with Go installed", err)
	}
	return strings.TrimSpace(string(out)), nil
}

var versionLine = regexp.MustCompile(`(?m)^\s*(?:require )?k8s\.io/kubernetes (v1\.(\d+)\.\d+)\b`)

// buildParts returns the programs, and compiles them if they are not in the cache.
func buildParts(ctx context.Context, log func(string, ...any)) (*parts, error) {
	repo, err := repository(ctx)
	if err != nil {
		return nil, err
	}
	source := filepath.Join(repo, "test", "kubernetes", "parts")
	sum, err := fingerprint(source)
	if err != nil {
		return nil, err
	}
	mod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return nil, err
	}
	found := versionLine.FindStringSubmatch(string(mod))
	if found == nil {
		return nil, fmt.Errorf("%s/go.mod: no version of k8s.io/kubernetes", source)
	}
	cache, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	p := &parts{version: found[1], dir: filepath.Join(cache, "parts-"+found[1]+"-"+sum)}
	unlock, err := lockFile(ctx, p.dir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(p.dir); err == nil {
		return p, nil
	}
	log("compiling Kubernetes %s into %s: once, some minutes", p.version, p.dir)
	began := time.Now()
	if err := compile(ctx, source, p, found[2]); err != nil {
		return nil, err
	}
	p.built = time.Since(began)
	log("compiled in %s", p.built.Round(time.Second))
	return p, nil
}

// compile builds everything into a folder beside the final one and renames it, so
// that what has the final name is whole.
func compile(ctx context.Context, source string, p *parts, minor string) error {
	temp, err := os.MkdirTemp(filepath.Dir(p.dir), "building-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	const v = "-X k8s.io/component-base/version."
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath",
		"-ldflags", "-s -w "+v+"gitVersion="+p.version+" "+v+"gitMajor=1 "+v+"gitMinor="+minor+" "+v+"gitTreeState=clean",
		"-o", temp+"/", "tool", "./etcd", "./coredns", "./pause")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile Kubernetes: %w\n%s", err, out)
	}
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	return os.Rename(temp, p.dir)
}

// fingerprint is of everything that decides what the programs will be.
func fingerprint(source string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH)
	err := filepath.WalkDir(source, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		rel, _ := filepath.Rel(source, path)
		fmt.Fprintf(h, "%s %d\n%s", rel, len(text), text)
		return err
	})
	return fmt.Sprintf("%x", h.Sum(nil)[:6]), err
}

// lockFile takes the lock that a file stands for, and waits for it.
func lockFile(ctx context.Context, file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", file, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: another one holds it: %w", file, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}
