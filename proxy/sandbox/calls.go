package sandbox

import "golang.org/x/sys/unix"

// call is a system call with its numbers, which differ between architectures.
type call struct {
	name         string
	amd64, arm64 uint32
	from         origin
}

// none says that an architecture does not have a call.
const none = ^uint32(0)

// origin is the evidence for a call: who makes it.
type origin uint8

const (
	linked origin = iota // code of the executable does; TestEveryCallIsDecided finds it there
	kernel               // the kernel itself has a thread make it
	vdso                 // the kernel's code in the process does: at a signal's end on arm64
	libc                 // C's threads and memory do, in a build with cgo
)

// allowed without a look at the arguments. Below each group is what makes these calls.
var allowed = []call{
	// Descriptors that the process has: package os, the runtime's standard error, the
	// relay of bytes, long messages of the link, CPU limits in files opened at start.
	{"read", 0, 63, linked}, {"write", 1, 64, linked}, {"pread64", 17, 67, linked}, {"close", 3, 57, linked},
	{"fcntl", 72, 25, linked}, {"fstat", 5, 80, linked}, {"lseek", 8, 62, linked},
	{"pipe2", 293, 59, linked}, {"splice", 275, 76, linked}, {"memfd_create", 319, 279, linked},
	// The runtime's poller.
	{"epoll_create1", 291, 20, linked}, {"epoll_ctl", 233, 21, linked}, {"epoll_pwait", 281, 22, linked}, {"eventfd2", 290, 19, linked},
	// Sockets. Which ones are made is looked at (checked); none listens that the agent
	// did not make.
	{"accept4", 288, 242, linked}, {"bind", 49, 200, linked}, {"connect", 42, 203, linked}, {"shutdown", 48, 210, linked},
	{"getsockname", 51, 204, linked}, {"getpeername", 52, 205, linked}, {"getsockopt", 55, 209, linked}, {"setsockopt", 54, 208, linked},
	{"sendto", 44, 206, linked}, {"sendmsg", 46, 211, linked}, {"recvfrom", 45, 207, linked}, {"recvmsg", 47, 212, linked},
	// The runtime's memory: heap, stacks of threads, giving back under a limit, huge pages.
	{"munmap", 11, 215, linked}, {"madvise", 28, 233, linked}, {"mincore", 27, 232, linked},
	// Its scheduler: waiting, yielding, how many processors there are.
	{"futex", 202, 98, linked}, {"sched_yield", 24, 124, linked}, {"sched_getaffinity", 204, 123, linked}, {"nanosleep", 35, 101, linked},
	// Its threads, and their signals: preemption, and how it dies.
	{"gettid", 186, 178, linked}, {"getpid", 39, 172, linked}, {"exit", 60, 93, linked}, {"exit_group", 231, 94, linked},
	{"rt_sigaction", 13, 134, linked}, {"rt_sigprocmask", 14, 135, linked}, {"rt_sigreturn", 15, 139, vdso}, {"sigaltstack", 131, 132, linked},
	{"arch_prctl", 158, none, linked}, // a thread's own storage on amd64
	// Time and chance; both mostly without a call, by the kernel's code in the process.
	{"clock_gettime", 228, 113, linked}, {"getrandom", 318, 278, linked},
	// A wait that a stop of the process has interrupted goes on with this.
	{"restart_syscall", 219, 128, kernel},
	// A build with cgo.
	{"gettimeofday", 96, 169, libc}, {"time", 201, none, libc},
	{"brk", 12, 214, libc}, {"set_robust_list", 273, 99, libc}, {"rseq", 334, 293, libc}, {"clock_nanosleep", 230, 115, libc},
}

// absent calls must look so, not forbidden, so that a library falls back.
var absent = []call{{"clone3", 435, 435, libc}}

// checked are allowed with some arguments.
var checked = []struct {
	call
	block func(*assembler, process)
}{
	// TCP and UDP over IP, and the link. With CAP_NET_RAW a type or a protocol more
	// would be a view of other people's packets.
	{call{"socket", 41, 198, linked}, func(b *assembler, _ process) {
		b.load(arg(0))
		b.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.AF_UNIX, 0, 1)
		b.ret(actAllow)
		b.require(unix.AF_INET, unix.AF_INET6)
		b.load(arg(1))
		b.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, ^uint32(unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC), 0, 0)
		b.require(unix.SOCK_STREAM, unix.SOCK_DGRAM)
		b.oneOf(arg(2), 0, 0, unix.IPPROTO_TCP, unix.IPPROTO_UDP)
	}},
	{call{"socketpair", 53, 199, linked}, func(b *assembler, _ process) { b.oneOf(arg(0), 0, unix.AF_UNIX) }},
	{call{"mmap", 9, 222, linked}, notExecutable},
	{call{"mprotect", 10, 226, linked}, notExecutable},
	{call{"clone", 56, 220, linked}, func(b *assembler, _ process) { b.oneOf(arg(0), unix.CLONE_THREAD, unix.CLONE_THREAD) }},
	{call{"tgkill", 234, 131, linked}, func(b *assembler, p process) { b.oneOf(arg(0), 0, p.pid) }},
	{call{"prctl", 157, 167, linked}, func(b *assembler, _ process) { b.oneOf(arg(0), 0, unix.PR_SET_VMA) }}, // names of memory areas
}

func notExecutable(b *assembler, _ process) { b.oneOf(arg(2), unix.PROT_EXEC, 0) }

// on returns the number on an architecture, and whether that has the call.
func (c call) on(goarch string) (uint32, bool) {
	nr := c.amd64
	if goarch == "arm64" {
		nr = c.arm64
	}
	return nr, nr != none
}
