package attest

import (
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
	f, err := elf.NewFile(r)
	if err != nil {
		return "" // binfmt_misc and scripts never appear here: the kernel runs their interpreter
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return ""
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
