package sandbox

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// refused are the calls that the executable holds code for and that a proxy must not
// make any more once it is inside, with what that code is.
var refused = map[string]string{
	"openat":                  "files: the runtime's look at CPU limits and package os, before; nothing after",
	"newfstatat":              "files",
	"unlinkat":                "files: os.RemoveAll, in os.Root's company",
	"readlinkat":              "files",
	"getdents64":              "files",
	"faccessat":               "files",
	"listen":                  "listeners are the agent's",
	"dup":                     "what F_DUPFD_CLOEXEC replaced; only kernels of before 2.6.24 need it",
	"uname":                   "package net asks for the kernel's version when it listens",
	"kill":                    "the runtime, for a core dump of all threads, which nobody has asked for without an environment",
	"wait4":                   "processes: package os",
	"waitid":                  "processes: package os tries at start",
	"pidfd_open":              "processes: package os tries at start",
	"pidfd_send_signal":       "processes: package os tries at start",
	"prlimit64":               "package os raises the limit of descriptors at start",
	"timer_create":            "the profiler, which nobody starts",
	"timer_settime":           "the profiler",
	"timer_delete":            "the profiler",
	"mremap":                  "x/sys/unix.Mremap, which nobody calls",
	"seccomp":                 "Enter",
	"landlock_create_ruleset": "Enter",
	"capget":                  "Enter",
}

// forwards are functions that are told which call to make: whoever tells them is
// looked at instead. Each is a caller of the function that makes the call.
var forwards = []string{
	"syscall.Syscall", "syscall.Syscall6", "syscall.RawSyscall", "syscall.RawSyscall6", "syscall.rawSyscallNoError", "syscall.rawVforkSyscall",
	"syscall.AllThreadsSyscall", "syscall.AllThreadsSyscall6", "syscall.runtime_doAllThreadsSyscall", "runtime.runPerThreadSyscall",
	"golang.org/x/sys/unix.Syscall", "golang.org/x/sys/unix.Syscall6", "golang.org/x/sys/unix.RawSyscall", "golang.org/x/sys/unix.RawSyscall6",
	"golang.org/x/sys/unix.SyscallNoError", "golang.org/x/sys/unix.RawSyscallNoError",
	"internal/runtime/syscall/linux.Syscall6",
	// Ours: read and write; prctl, capset and landlock_restrict_self of Enter.
	"assay.dev/proxy/nowait.transfer", "assay.dev/proxy/sandbox.onAllThreads",
	// fcntl, which is another call on machines with 32 bits.
	"golang.org/x/sys/unix.fcntl",
	// clone, or clone3 for a descriptor of the child: package os tries at start.
	"syscall.doCheckClonePidfd",
}

// TestEveryCallIsDecided takes the executable apart, for both architectures, and finds
// every system call that code in it can make, however seldom: that is what the
// allow-list is made from. A call that is neither allowed nor refused with a reason
// has come with a new Go, a new module or new code of ours: decide.
func TestEveryCallIsDecided(t *testing.T) {
	known := map[string]call{}
	for _, c := range everyAllowed() {
		known[c.name] = c
	}
	for _, goarch := range []string{"amd64", "arm64"} {
		t.Run(goarch, func(t *testing.T) {
			t.Parallel()
			found, unclear := systemCalls(t, goarch)
			numbers := numbersOf(t, goarch)
			names := map[uint32]string{}
			for name, nr := range numbers {
				names[nr] = name
			}
			seen := map[string]bool{}
			for _, nr := range slices.Sorted(maps.Keys(found)) {
				name := names[nr]
				seen[name] = true
				c, isKnown := known[name]
				switch {
				case refused[name] != "":
				case !isKnown:
					t.Errorf("system call %d (%s) is linked by %v, and neither allowed nor refused", nr, name, found[nr])
				case c.from == libc || c.from == kernel:
					t.Errorf("%s is linked by %v, and listed as nobody's of the executable's", name, found[nr])
				}
			}
			for _, c := range known {
				if _, has := c.on(goarch); has && c.from == linked && !seen[c.name] {
					t.Errorf("%s is allowed, and no code makes it", c.name)
				}
			}
			for name := range refused {
				if known[name].name != "" {
					t.Errorf("%s is both allowed and refused", name)
				}
			}
			for _, where := range unclear {
				if !slices.Contains(forwards, where) {
					t.Errorf("%s makes a system call that it does not name in the same breath: who tells it?", where)
				}
			}
			t.Logf("%d calls are linked", len(found))
		})
	}
}

// TestNumbers compares the table with the kernel's, as package unix has them.
func TestNumbers(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		numbers := numbersOf(t, goarch)
		for _, c := range everyAllowed() {
			want, exists := numbers[c.name]
			if nr, has := c.on(goarch); has != exists || has && nr != want {
				t.Errorf("%s: %s is %d (%v), want %d (%v)", goarch, c.name, nr, has, want, exists)
			}
		}
	}
}

func everyAllowed() []call {
	list := slices.Concat(allowed, absent)
	for _, c := range checked {
		list = append(list, c.call)
	}
	return list
}

// numbersOf reads the numbers of system calls from the source of package unix, which
// has them for all architectures.
func numbersOf(t *testing.T, goarch string) map[string]uint32 {
	t.Helper()
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Fatal(err)
	}
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(strings.TrimSpace(string(dir)), "zsysnum_linux_"+goarch+".go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	numbers := map[string]uint32{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		name, isCall := strings.CutPrefix(spec.Names[0].Name, "SYS_")
		if value, ok := spec.Values[0].(*ast.BasicLit); ok && isCall {
			nr, err := strconv.ParseUint(value.Value, 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			numbers[strings.ToLower(name)] = uint32(nr)
		}
		return true
	})
	return numbers
}

// systemCalls builds the proxy and returns the numbers of the system calls in its code
// with the functions that make them, and the functions whose call's number is not
// known where it is made.
func systemCalls(t *testing.T, goarch string) (found map[uint32][]string, unclear []string) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "proxy")
	build := exec.Command("go", "build", "-o", bin, "assay.dev/cmd/assay-proxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+goarch)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	dump := exec.Command("go", "tool", "objdump", bin)
	dump.Stderr = os.Stderr
	out, err := dump.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := dump.Start(); err != nil {
		t.Fatal(err)
	}
	found = map[uint32][]string{}
	for f := range functions(t, out) {
		f.calls(goarch, func(nr uint64, known bool) {
			if name := strings.TrimSuffix(f.name, ".abi0"); !known {
				unclear = append(unclear, name)
			} else if !slices.Contains(found[uint32(nr)], name) {
				found[uint32(nr)] = append(found[uint32(nr)], name)
			}
		})
	}
	if err := dump.Wait(); err != nil {
		t.Fatalf("objdump: %v", err)
	}
	slices.Sort(unclear)
	return found, slices.Compact(unclear)
}

// function is one function's instructions, in Go's assembler's syntax.
type function struct {
	name string
	code []instruction
}

type instruction struct {
	address uint64
	text    string
}

// functions reads what objdump says.
func functions(t *testing.T, r io.Reader) func(yield func(function) bool) {
	return func(yield func(function) bool) {
		var f function
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if head, ok := strings.CutPrefix(lines.Text(), "TEXT "); ok {
				if f.name != "" && !yield(f) {
					return
				}
				name, _, _ := strings.Cut(head, "(SB)")
				f = function{name: name}
				continue
			}
			parts := strings.FieldsFunc(lines.Text(), func(r rune) bool { return r == '\t' })
			if len(parts) < 4 {
				continue
			}
			at, err := strconv.ParseUint(parts[1], 0, 64)
			if err != nil {
				t.Fatalf("objdump: %q", lines.Text())
			}
			f.code = append(f.code, instruction{at, strings.TrimSpace(parts[3])})
		}
		if err := lines.Err(); err != nil {
			t.Fatal(err)
		}
		if f.name != "" {
			yield(f)
		}
	}
}

var (
	enters  = regexp.MustCompile(`^(?:CALL|JMP|B) ((?:syscall|runtime|internal/runtime/syscall/linux|golang\.org/x/sys/unix)\.(?:[rR]aw(?:Vfork)?|AllThreads|runtime_doAllThreads)?Syscall(?:6|NoError)?)(\.abi0)?\(SB\)`)
	moves   = regexp.MustCompile(`^MOV\w* \$(-?\w+), (\S+)$`)
	ors     = regexp.MustCompile(`^ORR \$(\w+), ZR, (\S+)$`)
	copies  = regexp.MustCompile(`^MOV\w* ([A-Z]\w*), (\S+)$`)
	pairs   = regexp.MustCompile(`^STP \((\w+), (\w+)\), (\d+)\(RSP\)$`)
	clears  = regexp.MustCompile(`^XOR[LQ] (\w+), (\w+)$`)
	jumps   = regexp.MustCompile(`^(?:J\w+|B\w*|CBN?Z\w*|TBN?Z\w*) .*?(?:(0x[0-9a-f]+)|(-?\d+)\(PC\))$`)
	returns = regexp.MustCompile(`^(?:RET|JMP|B|UNDEF|INT)\b`)
)

// calls tells report the number of each system call that the function makes. It follows
// constants through registers and the stack as far as the next jump: a number that
// comes from further away is not known.
func (f function) calls(goarch string, report func(nr uint64, known bool)) {
	first, trap, slot, zero := "AX", "AX", "0(SP)", ""
	if goarch == "arm64" {
		first, trap, slot, zero = "R0", "R8", "8(RSP)", "ZR"
	}
	targets := map[uint64]bool{}
	for _, in := range f.code {
		if m := jumps.FindStringSubmatch(in.text); m != nil {
			if at, err := strconv.ParseUint(m[1], 0, 64); err == nil {
				targets[at] = true
			} else if n, err := strconv.ParseInt(m[2], 10, 64); err == nil {
				targets[in.address+uint64(4*n)] = true
			}
		}
	}
	value := map[string]uint64{}
	set := func(place, from string) {
		if v, ok := value[from]; ok {
			value[place] = v
		} else if from == zero {
			value[place] = 0
		} else {
			delete(value, place)
		}
	}
	for _, in := range f.code {
		if targets[in.address] {
			clear(value)
		}
		if in.text == "SYSCALL" || strings.HasPrefix(in.text, "SVC ") {
			nr, ok := value[trap]
			report(nr, ok)
			delete(value, first)
			continue
		}
		if m := enters.FindStringSubmatch(in.text); m != nil {
			place := first
			if m[2] != "" {
				place = slot
			}
			nr, ok := value[place]
			report(nr, ok)
		}
		switch m := []string(nil); {
		case strings.HasPrefix(in.text, "CALL ") || returns.MatchString(in.text):
			clear(value)
		case match(moves, in.text, &m), match(ors, in.text, &m):
			if v, err := strconv.ParseInt(m[1], 0, 64); err == nil {
				value[m[2]] = uint64(v)
			} else {
				delete(value, m[2])
			}
		case match(clears, in.text, &m) && m[1] == m[2]:
			value[m[2]] = 0
		case match(copies, in.text, &m):
			set(m[2], m[1])
		case match(pairs, in.text, &m):
			at, _ := strconv.Atoi(m[3])
			set(strconv.Itoa(at)+"(RSP)", m[1])
			set(strconv.Itoa(at+8)+"(RSP)", m[2])
		default:
			// Whatever else it does, it may change its last operand.
			delete(value, in.text[strings.LastIndexByte(in.text, ' ')+1:])
		}
	}
}

func match(re *regexp.Regexp, text string, m *[]string) bool {
	*m = re.FindStringSubmatch(text)
	return *m != nil
}
