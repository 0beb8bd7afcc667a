package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// allowed without a look at the arguments.
var allowed = []uint32{
	// Descriptors that it has.
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_CLOSE,
	unix.SYS_FCNTL, unix.SYS_FSTAT, unix.SYS_LSEEK, unix.SYS_PIPE2, unix.SYS_SPLICE, unix.SYS_DUP3,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EVENTFD2, unix.SYS_PPOLL,
	// Sockets; making them is looked at.
	unix.SYS_ACCEPT4, unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_SHUTDOWN,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT,
	unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_RECVFROM, unix.SYS_RECVMSG,
	// Long messages on the link.
	unix.SYS_MEMFD_CREATE,
	// The Go runtime: memory, threads, time, signals.
	unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_BRK, unix.SYS_MINCORE,
	unix.SYS_FUTEX, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ,
	unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_GETTIMEOFDAY, unix.SYS_RESTART_SYSCALL,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK,
	unix.SYS_GETRANDOM,
}

// absent calls must look so, not forbidden, so that a library falls back.
var absent = []uint32{unix.SYS_CLONE3}

const (
	dataNumber = 0 // struct seccomp_data
	dataArch   = 4
	dataArgs   = 16

	x32 = 0x40000000 // system calls of another numbering on amd64
)

// arg is the offset of the low half of argument n, on a little-endian machine.
func arg(n uint32) uint32 { return dataArgs + 8*n }

// assembler writes a filter as a list of blocks, one for each system call.
type assembler struct{ code []unix.SockFilter }

func (a *assembler) add(code uint16, k uint32, jt, jf uint8) {
	a.code = append(a.code, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
}

func (a *assembler) load(offset uint32) {
	a.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset, 0, 0)
}
func (a *assembler) ret(action uint32) { a.add(unix.BPF_RET|unix.BPF_K, action, 0, 0) }

const (
	actAllow = unix.SECCOMP_RET_ALLOW
	actDeny  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	actNone  = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// when gives system call nr the action; the accumulator holds the number.
func (a *assembler) when(nr, action uint32) {
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, nr, 0, 1)
	a.ret(action)
}

// check runs a block for system call nr, which must return in every case.
func (a *assembler) check(nr uint32, block func(*assembler)) {
	var b assembler
	block(&b)
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, nr, 0, uint8(len(b.code)))
	a.code = append(a.code, b.code...)
}

// oneOf allows when the value at offset, masked, is one of values.
func (a *assembler) oneOf(offset, mask uint32, values ...uint32) {
	a.load(offset)
	if mask != 0 {
		a.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, mask, 0, 0)
	}
	a.in(values...)
}

// in allows when the accumulator is one of values, else denies.
func (a *assembler) in(values ...uint32) {
	for i, v := range values {
		a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, v, uint8(len(values)-i), 0)
	}
	a.ret(actDeny)
	a.ret(actAllow)
}

// require denies unless the accumulator is one of values, and goes on.
func (a *assembler) require(values ...uint32) {
	for i, v := range values {
		a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, v, uint8(len(values)-i), 0)
	}
	a.ret(actDeny)
}

// filter is the whole program for a process with this ID.
func filter(goarch string, pid uint32) ([]unix.SockFilter, error) {
	machine := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[goarch]
	if machine == 0 {
		return nil, fmt.Errorf("there is no filter for %s", goarch)
	}
	var a assembler
	a.load(dataArch)
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, machine, 1, 0)
	a.ret(unix.SECCOMP_RET_KILL_PROCESS)
	a.load(dataNumber)
	a.add(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, x32, 0, 1)
	a.ret(actDeny)
	for _, nr := range append(allowed, ownArch...) {
		a.when(nr, actAllow)
	}
	for _, nr := range absent {
		a.when(nr, actNone)
	}
	const types = ^uint32(unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC)
	// TCP and UDP over IP, and the link. With CAP_NET_RAW a type or a protocol more
	// would be a view of other people's packets.
	a.check(unix.SYS_SOCKET, func(b *assembler) {
		b.load(arg(0))
		b.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.AF_UNIX, 0, 1)
		b.ret(actAllow)
		b.require(unix.AF_INET, unix.AF_INET6)
		b.load(arg(1))
		b.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, types, 0, 0)
		b.require(unix.SOCK_STREAM, unix.SOCK_DGRAM)
		b.oneOf(arg(2), 0, 0, unix.IPPROTO_TCP, unix.IPPROTO_UDP)
	})
	a.check(unix.SYS_SOCKETPAIR, func(b *assembler) { b.oneOf(arg(0), 0, unix.AF_UNIX) })
	noExec := func(b *assembler) { b.oneOf(arg(2), unix.PROT_EXEC, 0) }
	a.check(unix.SYS_MMAP, noExec)
	a.check(unix.SYS_MPROTECT, noExec)
	a.check(unix.SYS_CLONE, func(b *assembler) { b.oneOf(arg(0), unix.CLONE_THREAD, unix.CLONE_THREAD) })
	a.check(unix.SYS_TGKILL, func(b *assembler) { b.oneOf(arg(0), 0, pid) })
	a.check(unix.SYS_PRCTL, func(b *assembler) { b.oneOf(arg(0), 0, unix.PR_SET_VMA) }) // names of memory areas
	a.ret(actDeny)
	return a.code, nil
}
