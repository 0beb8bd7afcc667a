package sandbox

import "golang.org/x/sys/unix"

// ownArch are what only this architecture has: thread-local storage, and older
// forms that its vDSO and runtime fall back to.
var ownArch = []uint32{unix.SYS_ARCH_PRCTL, unix.SYS_EPOLL_WAIT, unix.SYS_TIME}
