package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

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

// process is who the filter is for.
type process struct {
	goarch string
	pid    uint32
}

// filter is the whole program.
func filter(p process) ([]unix.SockFilter, error) {
	machine := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[p.goarch]
	if machine == 0 {
		return nil, fmt.Errorf("there is no filter for %s", p.goarch)
	}
	var a assembler
	a.load(dataArch)
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, machine, 1, 0)
	a.ret(unix.SECCOMP_RET_KILL_PROCESS)
	a.load(dataNumber)
	a.add(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, x32, 0, 1)
	a.ret(actDeny)
	for _, c := range allowed {
		if nr, ok := c.on(p.goarch); ok {
			a.when(nr, actAllow)
		}
	}
	for _, c := range absent {
		if nr, ok := c.on(p.goarch); ok {
			a.when(nr, actNone)
		}
	}
	for _, c := range checked {
		if nr, ok := c.on(p.goarch); ok {
			a.check(nr, func(b *assembler) { c.block(b, p) })
		}
	}
	a.ret(actDeny)
	return a.code, nil
}
