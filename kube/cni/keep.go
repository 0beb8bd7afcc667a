package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// savedSuffix is what the name of a .conf ends in while a .conflist of ours stands for
// it: runtimes read the first file of a folder whose name ends in .conf, .conflist or
// .json.
const savedSuffix = ".before-assay"

// lookEvery is how often the folder is looked at. A pod that starts in between, after the
// network's plugin has written its file anew, is captured while it runs.
const lookEvery = 250 * time.Millisecond

// Keep keeps the plugin chained in the configuration that the runtime uses, the first
// one of the folder, whatever the network's own plugin writes there, until ctx ends.
// notice is told of what changes and of what fails, once each, and of the end of a failure.
func Keep(ctx context.Context, dir, agent string, notice func(file string, err error)) {
	var said error
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		file, changed, err := install(dir, agent)
		if changed || fmt.Sprint(err) != fmt.Sprint(said) {
			said = err
			notice(file, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Ours are the files of a folder in which the plugin is chained.
func Ours(dir string) ([]string, error) {
	files, err := configurations(dir)
	return slices.DeleteFunc(files, func(f string) bool {
		b, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			return true
		}
		n, err := parse(b)
		return err != nil || n.count() == 0
	}), err
}

// install chains the plugin in the first usable configuration.
func install(dir, agent string) (file string, changed bool, err error) {
	files, err := configurations(dir)
	if err != nil {
		return "", false, err
	}
	failed := error(&assay.Error{Kind: assay.NotFound, Op: "chain " + Type + " in " + dir, Err: errors.New("there is no network configuration yet"),
		Remedy: "the cluster's network plugin writes it; if it is elsewhere, name that folder"})
	for _, file := range files {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced just now
		}
		var out []byte
		if err == nil {
			out, changed, err = Chain(b, agent)
		}
		if err != nil {
			// Runtimes pass over what they cannot read, and so do we.
			failed = &assay.Error{Kind: assay.Invalid, Op: "chain " + Type + " in " + filepath.Join(dir, file), Err: err}
			continue
		}
		if !changed {
			return file, false, nil
		}
		if plain, ok := strings.CutSuffix(file, ".conf"); ok {
			if err := write(dir, plain+".conflist", out); err != nil {
				return file, false, err
			}
			return plain + ".conflist", true, os.Rename(filepath.Join(dir, file), filepath.Join(dir, file+savedSuffix))
		}
		return file, true, write(dir, file, out)
	}
	return "", false, failed
}

// Remove takes the plugin out of every configuration of the folder, and puts those back
// that were replaced.
func Remove(dir string) error {
	files, err := configurations(dir)
	for _, file := range files {
		path := filepath.Join(dir, file)
		if plain, ok := strings.CutSuffix(file, ".conflist"); ok {
			saved := filepath.Join(dir, plain+".conf"+savedSuffix)
			if _, failed := os.Stat(saved); failed == nil {
				err = errors.Join(err, os.Rename(saved, filepath.Join(dir, plain+".conf")), os.Remove(path))
				continue
			}
		}
		b, failed := os.ReadFile(path)
		if failed != nil {
			err = errors.Join(err, failed)
			continue
		}
		out, changed, failed := Unchain(b)
		if failed != nil || !changed {
			continue // not ours
		}
		err = errors.Join(err, write(dir, file, out))
	}
	return err
}

// configurations are the files that a runtime reads, in its order.
func configurations(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &assay.Error{Op: "read the network configurations in " + dir, Err: err}
	}
	var files []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".conf" || ext == ".conflist" || ext == ".json") {
			files = append(files, e.Name())
		}
	}
	slices.Sort(files)
	return files, nil
}

// write replaces a file whole, with the mode that it had.
func write(dir, name string, b []byte) (err error) {
	mode := fs.FileMode(0o644)
	if st, err := os.Stat(filepath.Join(dir, name)); err == nil {
		mode = st.Mode().Perm()
	}
	f, err := os.CreateTemp(dir, ".assay-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(dir, name))
}
