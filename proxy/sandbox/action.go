//go:build !assay_trap

package sandbox

import "golang.org/x/sys/unix"

// actDeny is what happens to a call that is not allowed.
const actDeny = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
