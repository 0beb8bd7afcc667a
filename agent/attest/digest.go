package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"

	"assay.dev"
	"golang.org/x/sys/unix"
)

// FileID says which file, and which content as far as the kernel can tell: writing
// changes the times.
type FileID struct {
	Dev, Inode   uint64
	Size         int64
	Mtime, Ctime int64 // nanoseconds
}

func fileID(st *unix.Stat_t) FileID {
	return FileID{Dev: uint64(st.Dev), Inode: st.Ino, Size: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano()}
}

// ErrChanged is returned for a file that was written to while it was read.
var ErrChanged = errors.New("the file was changed while it was read")

// Digester digests files and remembers what it found by FileID, so that a thousand
// instances of one program cost one reading. It is safe for concurrent use; the zero
// value is ready.
type Digester struct {
	mu   sync.Mutex
	seen map[FileID]assay.Digest
}

const maxSeen = 1024

// maxFile bounds a file: one with holes costs its maker nothing and its reader hours.
const maxFile = 16 << 30

// File digests an open file from its beginning.
func (d *Digester) File(f *os.File) (assay.Digest, FileID, error) {
	id, err := stat(f)
	if err != nil {
		return "", FileID{}, err
	}
	if id.Size > maxFile {
		return "", FileID{}, fmt.Errorf("digest %s: %d bytes are more than the %d that a start can wait for", f.Name(), id.Size, int64(maxFile))
	}
	d.mu.Lock()
	got, ok := d.seen[id]
	d.mu.Unlock()
	if ok {
		return got, id, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, id.Size)); err != nil {
		return "", FileID{}, fmt.Errorf("digest %s: %w", f.Name(), err)
	}
	if again, err := stat(f); err != nil || again != id {
		return "", FileID{}, errors.Join(fmt.Errorf("digest %s: %w", f.Name(), ErrChanged), err)
	}
	got = sum(h)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seen == nil || len(d.seen) >= maxSeen {
		d.seen = map[FileID]assay.Digest{} // simpler than ages, and as rare
	}
	d.seen[id] = got
	return got, id, nil
}

func stat(f *os.File) (FileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return FileID{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return FileID{}, fmt.Errorf("%s is not a regular file", f.Name())
	}
	return fileID(&st), nil
}

func sum(h hash.Hash) assay.Digest {
	return assay.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
}

// Executable returns the artifact that a process executes: the digest of the very
// file that runs, opened through /proc/PID/exe, wherever its path leads meanwhile.
// The kernel lets nobody write to it while it runs.
func (d *Digester) Executable(p *Process) (assay.Artifact, Facts, error) {
	for range 3 { // a process may execute another file in between
		f, err := os.Open(fmt.Sprintf("/proc/%d/exe", p.PID()))
		if err != nil {
			if !p.Alive() {
				err = ErrGone
			}
			return assay.Artifact{}, Facts{}, fmt.Errorf("process %d: executable: %w", p.PID(), err)
		}
		digest, id, err := d.File(f)
		unproven := ""
		if err == nil {
			unproven = Interpreter(f, readlink(f, p.PID()))
		}
		f.Close()
		if err != nil {
			return assay.Artifact{}, Facts{}, fmt.Errorf("process %d: %w", p.PID(), err)
		}
		facts, err := p.Facts()
		if err != nil {
			return assay.Artifact{}, Facts{}, err
		}
		if facts.ExeID == id {
			return assay.Artifact{Kind: assay.Executable, Name: printable(facts.Exe), Digest: digest, Unproven: printable(unproven)}, facts, nil
		}
	}
	return assay.Artifact{}, Facts{}, fmt.Errorf("process %d: executes one file after another", p.PID())
}

// maxName bounds what is told of a name. Whoever makes a file chooses its name, and a
// library's in it, and both travel: they must be text, and not too long.
const maxName = 1024

func printable(s string) string {
	if len(s) > maxName {
		s = s[:maxName/2] + "…" + s[len(s)-maxName/2:]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func readlink(f *os.File, pid int) string {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		name, _ = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	}
	return name
}
