package attest

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"assay.dev"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "wait-for-end" {
		var b [1]byte
		os.Stdin.Read(b[:])
		if len(os.Args) > 2 {
			err := syscall.Exec(os.Args[2], os.Args[2:], os.Environ())
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// child starts this test as another process that ends with its standard input.
func child(t *testing.T, exe string, args ...string) (*Process, func()) {
	t.Helper()
	cmd := exec.Command(exe, append([]string{"wait-for-end"}, args...)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait(); p.Close() })
	return p, func() { in.Close() }
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func TestFacts(t *testing.T) {
	p, end := child(t, self(t))
	var d Digester
	a, f, err := d.Executable(p)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	if a.Digest != assay.DigestOf(b) || a.Kind != assay.Executable || a.Unproven != "" {
		t.Errorf("artifact %+v, want the digest %s", a, assay.DigestOf(b))
	}
	own, err := Open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	mine, err := own.Facts()
	if err != nil {
		t.Fatal(err)
	}
	if f.NetNS != mine.NetNS || f.UID != uint32(os.Geteuid()) || f.Start < mine.Start || f.PID != p.PID() {
		t.Errorf("facts %+v, mine %+v", f, mine)
	}
	if _, err := Reopen(f.PID, f.Start+1); !errors.Is(err, ErrGone) {
		t.Errorf("reopened with another start time: %v", err)
	}
	again, err := Reopen(f.PID, f.Start)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()

	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errors.New("too early"))
	defer cancel()
	if err := p.Wait(ctx); err == nil || err.Error() != "too early" {
		t.Errorf("wait for a process that runs: %v", err)
	}
	end()
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.Alive() || again.Alive() {
		t.Error("an ended process is alive")
	}
	if _, err := p.Facts(); !errors.Is(err, ErrGone) {
		t.Errorf("facts of an ended process: %v", err)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, ErrGone) {
		t.Errorf("signal to an ended process: %v", err)
	}
}

// The path of an executable may lead to another file while it runs.
func TestTheFileThatRunsIsDigested(t *testing.T) {
	b, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	p, _ := child(t, exe)
	if err := os.Remove(exe); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, []byte("something else"), 0o755); err != nil {
		t.Fatal(err)
	}
	var d Digester
	a, _, err := d.Executable(p)
	if err != nil {
		t.Fatal(err)
	}
	if a.Digest != assay.DigestOf(b) {
		t.Errorf("digest %s, want that of the file that runs", a.Digest)
	}
}

func TestAnotherExecutableIsNoticed(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	p, end := child(t, self(t), sleep, "60")
	before, err := p.Facts()
	if err != nil {
		t.Fatal(err)
	}
	end()
	for deadline := time.Now().Add(10 * time.Second); ; {
		after, err := p.Facts()
		if err != nil {
			t.Fatal(err)
		}
		if after.ExeID != before.ExeID {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the change was never seen")
		}
	}
}

func TestInterpreter(t *testing.T) {
	empty := strings.NewReader("")
	for path, want := range map[string]bool{
		"/usr/bin/python3.11": true, "/usr/bin/dash": true, "/opt/jdk/bin/java": true, "/usr/bin/perl": true, "/usr/bin/node": true,
		"/usr/bin/ruby3.1 (deleted)": true, "/lib64/ld-linux-x86-64.so.2": true, "/usr/bin/busybox": true,
		"/usr/sbin/nginx": false, "/usr/lib/postgresql/15/bin/postgres": false, "/srv/payments": false, "/srv/shipping": false, "/srv/node-exporter": false,
	} {
		if got := Interpreter(empty, path); (got != "") != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	for _, name := range []string{"python3", "perl"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if Interpreter(f, "/srv/innocent") == "" && Interpreter(f, path) == "" {
			t.Errorf("%s is not recognised", path)
		}
	}
}

// Whoever makes a program can make its file so that reading it hurts.
func TestHostileExecutables(t *testing.T) {
	// One section of 8 GiB of nothing, said to hold the names of sections.
	file, err := os.Create(filepath.Join(t.TempDir(), "sections"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	header := elf.Header64{Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: 2, Machine: 62, Version: 1, Ehsize: 64, Phentsize: 56, Shoff: 64, Shentsize: 64, Shnum: 2, Shstrndx: 1}
	for _, x := range []any{header, elf.Section64{}, elf.Section64{Type: 3, Off: 4096, Size: 8 << 30}} {
		if err := binary.Write(file, binary.LittleEndian, x); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Truncate(9 << 30); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := Interpreter(file, "/opt/sections"); got != "" {
		t.Errorf("it is taken for an interpreter: %s", got)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("reading it took %d MiB", used>>20)
	}
	if err := file.Truncate(maxFile + 1); err != nil {
		t.Fatal(err)
	}
	var d Digester
	if _, _, err := d.File(file); err == nil {
		t.Error("it was digested whatever its size")
	}

	// A name that is no text, which no message to control may carry.
	b, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(t.TempDir(), "bad\xff\xfename")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	p, _ := child(t, exe)
	a, _, err := d.Executable(p)
	if err != nil {
		t.Fatal(err)
	}
	if !utf8.ValidString(a.Name) || !strings.Contains(a.Name, "name") {
		t.Errorf("its name is told as %q", a.Name)
	}
	if got := printable(strings.Repeat("é", 5000)); len(got) > maxName+8 || !utf8.ValidString(got) {
		t.Errorf("a long name is told in %d bytes", len(got))
	}
}

// Libraries are found where the loader finds them.
func TestLibraryNames(t *testing.T) {
	path, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs a program that is linked dynamically:", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	e, err := elf.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := e.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := libraryNames(f); err != nil || !slices.Equal(got, want) || len(want) == 0 {
		t.Errorf("%s: %q, %v; debug/elf says %q", path, got, err, want)
	}
}

func TestTreeDigest(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("run", "#!/bin/sh\n", 0o755)
	write("lib/b.js", "b", 0o644)
	write("lib/ä", "", 0o600)
	write("lib.txt", "x", 0o644)
	if err := os.Symlink("../run", filepath.Join(dir, "lib", "link")); err != nil {
		t.Fatal(err)
	}
	hash := func(s string) string { h := sha256.Sum256([]byte(s)); return hex.EncodeToString(h[:]) }
	want := assay.DigestOf([]byte("assay-tree-v1\n" +
		`d --- - "."` + "\n" +
		`d --- - "lib"` + "\n" +
		`f --- ` + hash("b") + ` "lib/b.js"` + "\n" +
		`l --- ` + hash("../run") + ` "lib/link"` + "\n" +
		`f --- ` + hash("") + ` "lib/\u00e4"` + "\n" +
		`f --- ` + hash("x") + ` "lib.txt"` + "\n" +
		`f x-- ` + hash("#!/bin/sh\n") + ` "run"` + "\n"))
	var d Digester
	first, err := d.TreeDigest(dir)
	if err != nil {
		t.Fatal(err)
	}
	if first != want {
		t.Errorf("digest %s, want %s by the specification", first, want)
	}
	for what, change := range map[string]func(){
		"content":    func() { write("lib/b.js", "c", 0o644) },
		"executable": func() { write("lib/b.js", "b", 0o755) },
		"a new file": func() { write("more", "", 0o644) },
	} {
		change()
		if got, err := d.TreeDigest(dir); err != nil || got == first {
			t.Errorf("%s changed: digest %s, %v", what, got, err)
		}
		write("lib/b.js", "b", 0o644)
		os.Remove(filepath.Join(dir, "more"))
	}
	// What differs between hosts does not count.
	write("lib/b.js", "b", 0o600)
	os.Chtimes(filepath.Join(dir, "run"), time.Unix(1, 0), time.Unix(1, 0))
	if got, err := d.TreeDigest(dir); err != nil || got != first {
		t.Errorf("times and read permissions changed the digest: %s, %v", got, err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.TreeDigest(dir); err == nil {
		t.Error("a pipe in a tree was digested")
	}
	one, err := d.TreeDigest(filepath.Join(dir, "run"))
	if err != nil || one != assay.DigestOf([]byte("assay-tree-v1\nf x-- "+hash("#!/bin/sh\n")+` "."`+"\n")) {
		t.Errorf("one file: %s, %v", one, err)
	}
}
