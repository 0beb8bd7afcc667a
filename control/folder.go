package control

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
	"assay.dev/discovery"
)

// Bounds of the folder of intent.
const (
	maxIntentFiles = 10_000
	maxIntentFile  = 4 << 20
)

// watchEvery is how often the folder is looked at. A look that finds nothing new
// is a walk and a stat of each file.
const watchEvery = time.Second

// watch applies the folder of intent as a whole whenever a file in it changes. What
// cannot be applied is shown by Check and leaves the last good state in effect.
func (c *Control) watch(ctx context.Context, dir string) error {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			c.followFolder(ctx, dir)
		}
	}
}

// followFolder applies what is new in the folder. Open calls it before anything is
// served, so that a namespace that is to be strict never was anything else; then watch
// does.
func (c *Control) followFolder(ctx context.Context, dir string) {
	sign, err := c.look(ctx, dir, c.folder)
	if ctx.Err() != nil {
		return // what it says then is about us
	}
	if err == nil {
		c.folder = sign
	}
	if !c.intent.broke(err, c.now()) {
		return
	}
	if err != nil {
		c.log.Error("intent is not in effect; "+c.instead(), "folder", dir, "err", err)
	} else {
		c.log.Info("intent is in effect", "folder", dir)
	}
}

// instead says what is in effect when intent is not.
func (c *Control) instead() string {
	if c.cfg.Cluster != nil {
		return "what was before is in effect"
	}
	if c.cfg.Intent == "" {
		return "the rest of it is in effect"
	}
	for _, o := range c.intent.list() {
		if o.Source == fromFolder {
			return "the last good state is in effect"
		}
	}
	return "nothing of it ever was, so defaults are in effect"
}

// IntentProblem returns why intent is not in effect, and what is in effect instead; nil
// when it is. Check says the same.
func (c *Control) IntentProblem() error {
	_, err := c.intent.status()
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w; %s", err, c.instead())
}

// look applies the folder if it differs from what had the signature last, and
// returns its signature.
func (c *Control) look(ctx context.Context, dir, last string) (string, error) {
	names, sign, err := listIntent(dir)
	if err != nil || sign == last {
		return sign, err
	}
	var files []discovery.File
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "", &assay.Error{Kind: assay.Invalid, Op: "read intent", Err: err}
		}
		files = append(files, discovery.File{Name: name, YAML: b})
	}
	changes, err := c.apply(ctx, c.store, fromFolder, files, true)
	if err != nil {
		return "", err
	}
	for _, ch := range changes {
		if ch.Action != "unchanged" {
			c.log.Info("intent", "object", ch.Key.String(), "action", string(ch.Action))
		}
	}
	return sign, nil
}

// listIntent lists the files of intent beneath dir, sorted, with a signature that
// changes when one of them does. Names that begin with a dot are passed over.
func listIntent(dir string) (names []string, sign string, err error) {
	var b strings.Builder
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path != dir && strings.HasPrefix(d.Name(), ".") {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) {
			return nil
		}
		st, err := os.Stat(path) // follows links: mounted configuration is made of them
		if err != nil {
			return err
		}
		if st.Size() > maxIntentFile || len(names) == maxIntentFiles {
			return errors.New(path + ": too large, or too many files")
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		names = append(names, name)
		fmt.Fprintf(&b, "%q %d %d\n", name, st.Size(), st.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		return nil, "", &assay.Error{Kind: assay.Invalid, Op: "read intent", Err: err}
	}
	return names, "read\n" + b.String(), nil
}
