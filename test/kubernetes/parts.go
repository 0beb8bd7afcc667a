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
	"slices"
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

const containerdModule = "github.com/containerd/containerd/v2"

// moduleVersion reads from a go.mod which version of a module it requires.
func moduleVersion(dir, module string) (string, error) {
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return "", err
	}
	found := regexp.MustCompile(`(?m)^\s*(?:require )?` + regexp.QuoteMeta(module) + ` (v\d+\.\d+\.\d+)\b`).FindSubmatch(mod)
	if found == nil {
		return "", fmt.Errorf("%s/go.mod: no version of %s", dir, module)
	}
	return string(found[1]), nil
}

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
	version, err := moduleVersion(source, "k8s.io/kubernetes")
	if err != nil {
		return nil, err
	}
	cache, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	p := &parts{version: version, dir: filepath.Join(cache, "parts-"+version+"-"+sum)}
	unlock, err := lockFile(ctx, p.dir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := os.Chtimes(p.dir+".lock", time.Now(), time.Now()); err != nil {
		return nil, err
	}
	if _, err := os.Stat(p.dir); err == nil {
		return p, nil
	}
	log("compiling Kubernetes %s into %s: once, some minutes", p.version, p.dir)
	began := time.Now()
	if err := compile(ctx, source, p, strings.Split(version, ".")[1]); err != nil {
		return nil, err
	}
	p.built = time.Since(began)
	log("compiled in %s", p.built.Round(time.Second))
	return p, prune(ctx, cache)
}

// unused is how long programs that no cluster was made with are kept.
const unused = 14 * 24 * time.Hour

// prune removes the programs of other versions that nobody has used for long.
func prune(ctx context.Context, cache string) error {
	running, err := Running(ctx)
	if err != nil {
		return err
	}
	locks, err := filepath.Glob(filepath.Join(cache, "parts-*.lock"))
	if err != nil {
		return err
	}
	for _, lock := range locks {
		dir := strings.TrimSuffix(lock, ".lock")
		used := slices.ContainsFunc(running, func(r Record) bool { return filepath.Dir(r.Kubectl) == dir })
		if st, statErr := os.Stat(lock); used || statErr != nil || time.Since(st.ModTime()) < unused {
			continue
		}
		err = errors.Join(err, os.RemoveAll(dir), os.RemoveAll(dir+".building"), os.Remove(lock))
	}
	return err
}

// compile builds everything into a folder beside the final one and renames it, so
// that what has the final name is whole.
func compile(ctx context.Context, source string, p *parts, minor string) error {
	temp := p.dir + ".building" // ours alone: the lock is held
	if err := errors.Join(os.RemoveAll(temp), os.Mkdir(temp, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	const v = "-X k8s.io/component-base/version."
	build := func(dir, cgo, tags, variables string, packages ...string) error {
		args := append([]string{"build", "-trimpath", "-tags", tags, "-ldflags", "-s -w " + variables, "-o", temp + "/"}, packages...)
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOFLAGS=", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("compile %s: %w\n%s", dir, err, out)
		}
		return nil
	}
	if err := build(source, "0", "",
		v+"gitVersion="+p.version+" "+v+"gitMajor=1 "+v+"gitMinor="+minor+" "+v+"gitTreeState=clean",
		"tool", "./etcd", "./coredns", "./pause"); err != nil {
		return err
	}
	// runc is partly C, and filters system calls with libseccomp.
	runtime := filepath.Join(source, "runtime")
	version, err := moduleVersion(runtime, containerdModule)
	if err != nil {
		return err
	}
	if err := build(runtime, "1", "seccomp no_btrfs no_devmapper no_zfs urfave_cli_no_docs",
		"-X "+containerdModule+"/version.Version="+version, "tool"); err != nil {
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
