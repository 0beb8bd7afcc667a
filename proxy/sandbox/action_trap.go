//go:build assay_trap

package sandbox

import "golang.org/x/sys/unix"

// actDeny of a build for tests: the runtime dies of the signal and shows the stack that
// made the call, and its number in the register rax or r8.
const actDeny = unix.SECCOMP_RET_TRAP
