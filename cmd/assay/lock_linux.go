package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"assay.dev"
)

// lockFolder makes this process the only `assay up` on a folder. The lock ends with
// the process, however that ends.
func lockFolder(flag, dir string, mode os.FileMode) (*os.File, error) {
	op := "up " + flag + " " + dir
	if err := os.MkdirAll(dir, mode); err != nil {
		return nil, &assay.Error{Op: op, Err: err, Remedy: "name a folder that you may write to"}
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	if owner := int(st.Uid); owner != os.Geteuid() && owner != 0 {
		return nil, &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("it belongs to user %d, who could exchange what is in it", owner), Remedy: "name a folder of your own with " + flag}
	}
	f, err := os.OpenFile(filepath.Join(dir, "up.lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, &assay.Error{Op: op, Err: err, Remedy: "name a folder that you may write to"}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("in use by process %s", strings.TrimSpace(string(holder[:n]))),
				Remedy: "end that one first, or name another folder with " + flag}
		}
		return nil, &assay.Error{Op: op, Err: err}
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, &assay.Error{Op: op, Err: err}
	}
	return f, nil
}
