package kubernetes

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Record is what a running cluster says of itself to other processes.
type Record struct {
	Name       string
	PID        int // of the process that holds the cluster
	Version    string
	Nodes      int
	Kubeconfig string
	Kubectl    string
	Server     string
	Began      time.Time
}

// folder is a cluster's folder, with its lock held.
type folder struct {
	path string // ends in the name
	lock *os.File
}

// groupName is the name of the cluster's cgroups. Another user's cluster may have the
// same name, and a folder of its own.
func groupName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return fmt.Sprintf("%s-%x", filepath.Base(path), sum[:4])
}

func clustersFolder() (string, error) {
	cache, err := cacheFolder()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "clusters")
	return dir, os.MkdirAll(dir, 0o755)
}

// claim sweeps what dead clusters have left and takes the name for a new one.
func claim(ctx context.Context, name string) (*folder, error) {
	dir, err := clustersFolder()
	if err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := sweep(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name)
	if err := os.Mkdir(path, 0o755); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("cluster %s is up already: see `status`, or take it `down` first", name)
	} else if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(path, "lock"), nil, 0o644); err != nil {
		return nil, err
	}
	lock, err := holdLock(path)
	if err != nil {
		return nil, err
	}
	return &folder{path, lock}, nil
}

// holdLock takes the lock in a cluster's folder, or says (nil, nil) that somebody
// has it.
func holdLock(path string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(path, "lock"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// sweep removes what clusters have left whose process has died.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs error
	for _, e := range entries {
		f := &folder{path: filepath.Join(dir, e.Name())}
		f.lock, err = holdLock(f.path)
		switch {
		case err == nil && f.lock == nil: // it is up
		case err == nil || errors.Is(err, fs.ErrNotExist): // its maker died before it made the lock
			errs = errors.Join(errs, f.remove())
		default:
			errs = errors.Join(errs, err)
		}
	}
	return errs
}

// release is remove for a cluster that ends as it should.
func (f *folder) release() error {
	unlock, err := lockFile(context.Background(), filepath.Dir(f.path)+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	return f.remove()
}

// remove removes the cluster's cgroups, with what still runs in them, and the
// folder; the caller holds the lock of all clusters.
func (f *folder) remove() error {
	in, err := hierarchies()
	if err == nil {
		group := &cgroup{name: groupName(f.path), in: in}
		err = group.remove(20 * time.Second)
	}
	if err == nil {
		err = os.RemoveAll(f.path)
	}
	if f.lock != nil {
		f.lock.Close()
	}
	return err
}

func (f *folder) record(r Record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(f.path, "cluster.json"), append(text, '\n'), 0o644)
}

// Running lists the clusters that are up.
func Running(ctx context.Context) ([]Record, error) {
	dir, err := clustersFolder()
	if err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []Record
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if lock, err := holdLock(path); err != nil || lock != nil {
			if lock != nil {
				lock.Close()
			}
			continue // dead: the next New sweeps it
		}
		var r Record
		text, err := os.ReadFile(filepath.Join(path, "cluster.json"))
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err == nil {
			list = append(list, r)
		}
	}
	return list, nil
}

// Down takes the cluster of that name down, if there is one, and sweeps what dead
// ones have left.
func Down(ctx context.Context, name string) (wasUp bool, err error) {
	running, err := Running(ctx)
	if err != nil {
		return false, err
	}
	for _, r := range running {
		if r.Name != name {
			continue
		}
		if err := unix.Kill(r.PID, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
			return false, fmt.Errorf("take cluster %s down: signal process %d: %w", name, r.PID, err)
		}
		wasUp = true
	}
	dir, err := clustersFolder()
	if err != nil {
		return wasUp, err
	}
	for wasUp {
		lock, err := holdLock(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return wasUp, err
		}
		if lock != nil {
			lock.Close()
			break
		}
		select {
		case <-ctx.Done():
			return wasUp, fmt.Errorf("take cluster %s down: %w", name, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return wasUp, err
	}
	defer unlock()
	return wasUp, sweep(dir)
}
