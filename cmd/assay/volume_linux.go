package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"assay.dev"
)

// closeVolume takes back what a kubelet gives. Each time that it mounts a volume for a pod
// with an fsGroup it opens every file to that group; it is the pod's own, which nobody else is
// in, but keys that a group may read are refused. What belongs to others stays as it is.
func closeVolume(dir string) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() || info.Mode().Perm()&0o070 == 0 {
			return nil
		}
		return os.Chmod(path, info.Mode().Perm()&^0o070)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &assay.Error{Op: "close the volume at " + dir, Err: err, Remedy: "see that control's user owns what is in it"}
	}
	return nil
}
