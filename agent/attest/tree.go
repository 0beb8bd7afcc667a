package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"assay.dev"
)

// treeHeader begins every tree that is digested; a change of the form changes it.
const treeHeader = "assay-tree-v1\n"

// maxEntries bounds a tree: more are refused, since reading them would take longer
// than anybody waits for a start.
const maxEntries = 1 << 20

// TreeDigest digests a file, or a folder with everything in it.
//
// The digest is the SHA-256 of a text. Its first line is "assay-tree-v1". One line
// follows for each entry: of a folder, its entries in ascending order of the bytes of
// their names, each folder's own entries right after it. A line is
//
//	TYPE SP MODE SP CONTENT SP PATH LF
//
// TYPE is "f" for a regular file, "d" for a folder, "l" for a symbolic link; anything
// else is an error. MODE is three characters: "x" if the owner may execute a file,
// "u" for set-user-ID, "g" for set-group-ID, each "-" if not; "---" for folders and
// links. CONTENT is the SHA-256 of the file's bytes in lower-case hexadecimal digits,
// for a link the SHA-256 of its target as written, for a folder "-". PATH is relative
// to the root with "/" between names, as a double-quoted Go string literal in ASCII;
// the root itself is "." and has the first line.
//
// Owners, times, permissions to read and write, and hard links do not count: they
// differ between hosts and change nothing that is executed. Links are not followed.
func (d *Digester) TreeDigest(root string) (assay.Digest, error) {
	clean, err := filepath.EvalSymlinks(root)
	if err != nil {
		return "", fmt.Errorf("tree %s: %w", root, err)
	}
	info, err := os.Lstat(clean)
	if err != nil {
		return "", fmt.Errorf("tree %s: %w", root, err)
	}
	t := tree{digester: d, hash: sha256.New()}
	io.WriteString(t.hash, treeHeader)
	if info.IsDir() {
		// os.Root: a link that somebody puts in while we read leads nowhere.
		dir, err := os.OpenRoot(clean)
		if err != nil {
			return "", fmt.Errorf("tree %s: %w", root, err)
		}
		defer dir.Close()
		t.root = dir
		t.line("d", "---", "-", ".")
		err = t.folder(".")
		if err != nil {
			return "", fmt.Errorf("tree %s: %w", root, err)
		}
		return sum(t.hash), nil
	}
	f, err := os.Open(clean)
	if err != nil {
		return "", fmt.Errorf("tree %s: %w", root, err)
	}
	defer f.Close()
	if err := t.file(f, "."); err != nil {
		return "", fmt.Errorf("tree %s: %w", root, err)
	}
	return sum(t.hash), nil
}

type tree struct {
	digester *Digester
	root     *os.Root
	hash     hash.Hash
	entries  int
}

func (t *tree) line(kind, mode, content, name string) {
	fmt.Fprintf(t.hash, "%s %s %s %s\n", kind, mode, content, strconv.QuoteToASCII(name))
}

func (t *tree) folder(dir string) error {
	f, err := t.root.Open(dir)
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		if t.entries++; t.entries > maxEntries {
			return fmt.Errorf("more than %d entries", maxEntries)
		}
		if err := t.entry(path.Join(dir, n)); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) entry(name string) error {
	info, err := t.root.Lstat(name)
	if err != nil {
		return err
	}
	switch info.Mode().Type() {
	case 0:
		f, err := t.root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return t.file(f, name)
	case fs.ModeDir:
		t.line("d", "---", "-", name)
		return t.folder(name)
	case fs.ModeSymlink:
		target, err := t.root.Readlink(name)
		if err != nil {
			return err
		}
		content := sha256.Sum256([]byte(target))
		t.line("l", "---", hex.EncodeToString(content[:]), name)
		return nil
	}
	return fmt.Errorf("%s: a %s cannot be part of an artifact", name, info.Mode().Type())
}

func (t *tree) file(f *os.File, name string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	digest, _, err := t.digester.File(f)
	if err != nil {
		return err
	}
	mode := []byte("---")
	for i, bit := range []fs.FileMode{0o100, fs.ModeSetuid, fs.ModeSetgid} {
		if info.Mode()&bit != 0 {
			mode[i] = "xug"[i]
		}
	}
	t.line("f", string(mode), strings.TrimPrefix(string(digest), "sha256:"), name)
	return nil
}

// Tree returns the artifact of a tree.
func (d *Digester) Tree(root string) (assay.Artifact, error) {
	if !filepath.IsAbs(root) {
		return assay.Artifact{}, errors.New("tree " + root + ": the path must be absolute")
	}
	digest, err := d.TreeDigest(root)
	return assay.Artifact{Kind: assay.Tree, Name: root, Digest: digest}, err
}
