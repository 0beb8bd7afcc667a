package store

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"assay.dev"
)

// inMountNamespace runs the calling test again in a process with a mount namespace
// of its own, where it may mount, and returns true in that process. Whatever
// happens to it, its mounts end with it.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	const variable = "ASSAY_STORE_TEST_NAMESPACE"
	if os.Getenv(variable) == t.Name() {
		check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), variable+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Skipf("no mount namespace to be had here: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("in its mount namespace: %v\n%s", err, out.String())
	}
	if strings.Contains(out.String(), "--- SKIP") {
		t.Skip(out.String())
	}
	return false
}

// smallDisk mounts an empty file system of the given size.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=0777"))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestSQLiteDiskFull(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	ctx := t.Context()
	dir := smallDisk(t, "2m")
	db := openTest(t, filepath.Join(dir, "state.db"))
	fill := must(os.Create(filepath.Join(dir, "filler")))(t)
	defer fill.Close()
	check(t, db.PutMeta(ctx, "x", []byte("before")))
	for block := make([]byte, 4096); ; {
		if _, err := fill.Write(block); err != nil {
			break
		}
	}
	// What fits into pages that exist may still be stored; what does not is refused
	// entirely, again and again, and reading goes on.
	refused := 0
	for range 20 {
		err := db.Audited(Audit{Who: "uid 0"}).PutMeta(ctx, "x", make([]byte, 64<<10))
		if err == nil {
			t.Fatal("64 KB were stored on a full disk")
		}
		wantKind(t, err, assay.Unavailable)
		if !strings.Contains(err.Error(), "space") {
			t.Fatalf("error does not say what is missing: %v", err)
		}
		refused++
		equal(t, "what was stored before", string(must(db.GetMeta(ctx, "x"))(t)), "before")
	}
	if lines := must(db.ListAudit(ctx, "", 10))(t); len(lines) != 0 {
		t.Errorf("half of a refused write was stored: %+v", lines)
	}
	// With space again it works without being opened anew.
	check(t, fill.Truncate(0))
	check(t, db.PutMeta(ctx, "x", make([]byte, 64<<10)))

	// An empty store on a full disk.
	for block := make([]byte, 512); ; {
		if _, err := fill.Write(block); err != nil {
			break
		}
	}
	_, err := Open(ctx, filepath.Join(dir, "second.db"))
	wantKind(t, err, assay.Unavailable)
}

func TestSQLiteReadOnlyDisk(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	ctx := t.Context()
	dir := smallDisk(t, "8m")
	path := filepath.Join(dir, "state.db")
	db := must(Open(ctx, path))(t)
	check(t, db.PutMeta(ctx, "x", nil))
	check(t, db.Close())
	check(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	_, err := Open(ctx, path)
	wantKind(t, err, assay.Denied)
}
