package sandbox

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// machine runs a filter as the kernel would, for either architecture.
type machine struct {
	process
	vm *bpf.VM
}

func newMachine(t *testing.T, goarch string, pid uint32) *machine {
	t.Helper()
	code, err := filter(process{goarch, pid})
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]bpf.RawInstruction, len(code))
	for i, in := range code {
		raw[i] = bpf.RawInstruction{Op: in.Code, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	program, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatalf("%s: the filter has instructions that are none", goarch)
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatalf("%s: %v", goarch, err)
	}
	return &machine{process{goarch, pid}, vm}
}

var audit = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}

// run returns what the filter says of a call. It loads words from a struct
// seccomp_data; the kernel has them in the machine's order and this one, made for
// packets, in the network's, so every word is written in that.
func (m *machine) run(t *testing.T, arch, nr uint32, args ...uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[dataNumber:], nr)
	binary.BigEndian.PutUint32(data[dataArch:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[dataArgs+8*i:], uint32(a)) // the low half comes first
		binary.BigEndian.PutUint32(data[dataArgs+8*i+4:], uint32(a>>32))
	}
	action, err := m.vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(action)
}

// TestFilter runs both filters over every number, and over the arguments of the calls
// that are looked at.
func TestFilter(t *testing.T) {
	const pid = 4711
	looked := map[string]bool{}
	for _, goarch := range []string{"amd64", "arm64"} {
		m := newMachine(t, goarch, pid)
		want := map[uint32]uint32{}
		for _, c := range allowed {
			if nr, ok := c.on(goarch); ok {
				want[nr] = actAllow
			}
		}
		for _, c := range absent {
			if nr, ok := c.on(goarch); ok {
				want[nr] = actNone
			}
		}
		skip := map[uint32]bool{}
		for _, c := range checked {
			if nr, ok := c.on(goarch); ok {
				skip[nr] = true
			}
		}
		for nr := range uint32(1024) {
			if w, ok := want[nr]; ok != (w != 0) || skip[nr] && ok {
				t.Errorf("%s: %d is in two lists", goarch, nr)
			} else if !ok {
				w = actDeny
				if got := m.run(t, audit[goarch], nr); got != w && !skip[nr] {
					t.Errorf("%s: call %d: %#x, want %#x", goarch, nr, got, w)
				}
			} else if got := m.run(t, audit[goarch], nr, ^uint64(0), ^uint64(0), ^uint64(0)); got != w {
				t.Errorf("%s: call %d: %#x, want %#x", goarch, nr, got, w)
			}
		}
		// Another numbering than the table's.
		for _, nr := range []uint32{x32, x32 | 1, x32 | 512, ^uint32(0)} {
			if got := m.run(t, audit[goarch], nr); got != actDeny {
				t.Errorf("%s: call %#x: %#x", goarch, nr, got)
			}
		}
		for _, arch := range []uint32{unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_ARM, 0} {
			if got := m.run(t, arch, 1); got != unix.SECCOMP_RET_KILL_PROCESS {
				t.Errorf("%s: a call of architecture %#x: %#x", goarch, arch, got)
			}
		}
		for _, x := range []struct {
			name string
			args []uint64
			ok   bool
		}{
			{"socket", []uint64{unix.AF_UNIX, unix.SOCK_SEQPACKET | unix.SOCK_CLOEXEC, 0}, true},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, 0}, true},
			{"socket", []uint64{unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP}, true},
			{"socket", []uint64{unix.AF_INET6, unix.SOCK_DGRAM | unix.SOCK_CLOEXEC, unix.IPPROTO_UDP}, true},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP}, false},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_RAW | unix.SOCK_CLOEXEC, 0}, false},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP}, false},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP}, false},
			{"socket", []uint64{unix.AF_INET6, unix.SOCK_SEQPACKET, unix.IPPROTO_SCTP}, false},
			{"socket", []uint64{unix.AF_PACKET, unix.SOCK_RAW, unix.ETH_P_ALL}, false},
			{"socket", []uint64{unix.AF_PACKET, unix.SOCK_DGRAM, 0}, false},
			{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, 0}, false},
			{"socket", []uint64{unix.AF_VSOCK, unix.SOCK_STREAM, 0}, false},
			{"socket", []uint64{unix.AF_ALG, unix.SOCK_STREAM, 0}, false},
			{"socketpair", []uint64{unix.AF_UNIX, unix.SOCK_STREAM, 0}, true},
			{"socketpair", []uint64{unix.AF_INET, unix.SOCK_STREAM, 0}, false},
			{"mmap", []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, true},
			{"mmap", []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, false},
			{"mprotect", []uint64{4096, 4096, unix.PROT_NONE}, true},
			{"mprotect", []uint64{4096, 4096, unix.PROT_EXEC}, false},
			{"clone", []uint64{unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD}, true},
			{"clone", []uint64{uint64(unix.SIGCHLD)}, false},
			{"clone", []uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, false},
			{"clone", []uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, false},
			{"tgkill", []uint64{pid, pid, uint64(unix.SIGURG)}, true},
			{"tgkill", []uint64{1, 1, uint64(unix.SIGKILL)}, false},
			{"prctl", []uint64{unix.PR_SET_VMA, 0}, true},
			{"prctl", []uint64{unix.PR_SET_SECCOMP, 0}, false},
			{"prctl", []uint64{unix.PR_SET_DUMPABLE, 1}, false},
		} {
			looked[x.name] = true
			for _, c := range checked {
				if c.name != x.name {
					continue
				}
				nr, _ := c.on(goarch)
				got, want := m.run(t, audit[goarch], nr, x.args...), uint32(actDeny)
				if x.ok {
					want = actAllow
				}
				if got != want {
					t.Errorf("%s: %s%#x: %#x, want %#x", goarch, x.name, x.args, got, want)
				}
			}
		}
	}
	for _, c := range checked {
		if !looked[c.name] {
			t.Errorf("nobody tries %s", c.name)
		}
	}
	if _, err := filter(process{"mips", 1}); err == nil {
		t.Error("a filter for an architecture whose numbers are not known")
	}
}
