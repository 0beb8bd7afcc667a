package attest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path/filepath"
	"strings"
)

// interpreters are programs that do what some other file says. Versions follow the
// names (python3.11), so only what is before the first digit or '.' counts.
var interpreters = map[string]bool{
	"sh": true, "bash": true, "dash": true, "ash": true, "zsh": true, "ksh": true, "mksh": true, "fish": true, "csh": true, "tcsh": true,
	"busybox": true, "toybox": true,
	"python": true, "pypy": true, "perl": true, "ruby": true, "php": true, "php-fpm": true, "php-cgi": true,
	"node": true, "nodejs": true, "deno": true, "bun": true, "java": true, "dotnet": true, "mono": true, "mono-sgen": true,
	"lua": true, "luajit": true, "tclsh": true, "wish": true, "rscript": true, "r": true, "guile": true, "racket": true,
	"erl": true, "beam.smp": true, "beam": true, "gawk": true, "mawk": true, "awk": true, "env": true, "wasmtime": true,
	"qemu-x": true, "qemu-aarch": true, "ld-linux-x": true, "ld-linux-aarch": true, "ld-musl-x": true, "ld-linux": true, "ld-musl-aarch": true,
}

// libraries are interpreters that come as libraries: whoever is linked with one is
// suspected, whatever its name.
var libraries = []string{"libpython", "libjvm", "libjli", "libruby", "libperl", "libnode", "libphp", "libmono", "libcoreclr", "libhostfxr", "liblua"}

// Interpreter returns why an executable's digest proves nothing about the program
// that runs, or "". A statically linked interpreter under another name is not
// recognised.
func Interpreter(r io.ReaderAt, path string) string {
	name := strings.ToLower(strings.TrimSuffix(filepath.Base(path), " (deleted)"))
	reason := func(what string) string {
		return fmt.Sprintf("%s is an interpreter: its digest is the same for every program (--artifact PATH proves the program)", what)
	}
	base := name
	if i := strings.IndexAny(base, "0123456789"); i > 0 {
		base = strings.TrimRight(base[:i], ".-_")
	}
	if interpreters[base] || interpreters[name] || interpreters[strings.TrimSuffix(name, ".so")] {
		return reason(name)
	}
	needed, err := libraryNames(r)
	if err != nil {
		return "" // binfmt_misc and scripts never appear here: the kernel runs their interpreter
	}
	for _, lib := range needed {
		for _, known := range libraries {
			if strings.HasPrefix(lib, known) {
				return reason(name + ", linked with " + lib + ",")
			}
		}
	}
	return ""
}

// Bounds of what is read of a file that somebody made who may want the reader's memory.
const (
	maxDynamic   = 64 << 10
	maxLibraries = 1024
	maxLibrary   = 256
)

// libraryNames returns the libraries that an ELF file asks for, from where the kernel
// and the loader look: the segments. Sections decide nothing when a program runs, can
// be missing, and debug/elf believes their sizes.
func libraryNames(r io.ReaderAt) ([]string, error) {
	f, err := elf.NewFile(withoutSections{r})
	if err != nil {
		return nil, err
	}
	var dynamic []byte
	for _, p := range f.Progs {
		if p.Type == elf.PT_DYNAMIC {
			dynamic = make([]byte, min(p.Filesz, maxDynamic))
			n, err := p.ReadAt(dynamic, 0)
			if err != nil && err != io.EOF {
				return nil, err
			}
			dynamic = dynamic[:n]
		}
	}
	word, number := 8, f.ByteOrder.Uint64
	if f.Class == elf.ELFCLASS32 {
		word, number = 4, func(b []byte) uint64 { return uint64(f.ByteOrder.Uint32(b)) }
	}
	var table uint64
	var offsets []uint64
	for ; len(dynamic) >= 2*word && len(offsets) < maxLibraries; dynamic = dynamic[2*word:] {
		switch value := number(dynamic[word:]); elf.DynTag(number(dynamic)) {
		case elf.DT_STRTAB:
			table = value
		case elf.DT_NEEDED:
			offsets = append(offsets, value)
		case elf.DT_NULL:
			dynamic = nil
		}
		if dynamic == nil {
			break
		}
	}
	var names []string
	for _, off := range offsets {
		for _, p := range f.Progs {
			if p.Type != elf.PT_LOAD || table+off < p.Vaddr || table+off-p.Vaddr >= p.Filesz {
				continue
			}
			b := make([]byte, maxLibrary)
			n, _ := p.ReadAt(b, int64(table+off-p.Vaddr))
			name, _, _ := bytes.Cut(b[:n], []byte{0})
			names = append(names, string(name))
			break
		}
	}
	return names, nil
}

// withoutSections is an ELF file whose header says that it has none.
type withoutSections struct{ io.ReaderAt }

func (f withoutSections) ReadAt(b []byte, off int64) (int, error) {
	n, err := f.ReaderAt.ReadAt(b, off)
	var class [1]byte
	if off >= 64 {
		return n, err
	}
	if _, err := f.ReaderAt.ReadAt(class[:], elf.EI_CLASS); err != nil {
		return 0, err
	}
	// e_shoff, and e_shnum with e_shstrndx (elf(5)).
	for _, field := range map[elf.Class][2][2]int64{elf.ELFCLASS64: {{40, 48}, {60, 64}}, elf.ELFCLASS32: {{32, 36}, {48, 52}}}[elf.Class(class[0])] {
		for i := max(field[0], off); i < min(field[1], off+int64(n)); i++ {
			b[i-off] = 0
		}
	}
	return n, err
}
