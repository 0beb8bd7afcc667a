package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestCloseVolume: what a kubelet has opened to the pod's group is closed again, and nothing
// else is touched.
func TestCloseVolume(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Chmod(dir, 0o2775); err != nil {
		t.Fatal(err)
	}
	make := func(path string, mode os.FileMode, folder bool) {
		t.Helper()
		var err error
		if folder {
			err = os.Mkdir(path, 0o700)
		} else {
			err = os.WriteFile(path, nil, 0o600)
		}
		if err == nil {
			err = os.Chmod(path, mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ca := filepath.Join(dir, "ca")
	make(ca, 0o770|os.ModeSetgid, true)
	make(filepath.Join(ca, "root.key"), 0o660, false)
	make(filepath.Join(dir, "public"), 0o664, false)
	make(filepath.Join(dir, "closed"), 0o600, false)
	make(outside, 0o660, false)
	if err := os.Symlink(outside, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		theirs := filepath.Join(dir, "theirs")
		make(theirs, 0o660, false)
		if err := os.Chown(theirs, 0, 12345); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if st, err := os.Stat(theirs); err != nil || st.Mode().Perm() != 0o660 {
				t.Errorf("another group's file: %v, %v", st.Mode(), err)
			}
		}()
	}
	if err := closeVolume(dir); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{
		dir: 0o775, ca: 0o700, filepath.Join(ca, "root.key"): 0o600, filepath.Join(dir, "public"): 0o604,
		filepath.Join(dir, "closed"): 0o600, outside: 0o660,
	} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", path, st.Mode().Perm(), err, want)
		}
	}
	if err := closeVolume(filepath.Join(dir, "none")); err != nil {
		t.Errorf("a folder that is yet to be made: %v", err)
	}
}
