package http1

import (
	"net"
	"syscall"
	"unsafe"
)

// Reads and writes of non-blocking sockets go to the kernel without telling the
// scheduler: they never wait, and each announced call would wake the runtime's
// monitor thread when the process is otherwise idle, which costs more than the call.

// readFD reads once. It returns syscall.EAGAIN when there is nothing, and n == 0
// without an error at the end.
func readFD(fd uintptr, p []byte) (int, error) {
	return transfer(syscall.SYS_READ, "read", fd, p)
}

// writeFD writes once; n < len(p) without an error means that the kernel is full.
func writeFD(fd uintptr, p []byte) (int, error) {
	n, err := transfer(syscall.SYS_WRITE, "write", fd, p)
	if err == syscall.EAGAIN {
		return 0, nil
	}
	return n, err
}

func transfer(call uintptr, op string, fd uintptr, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, errAgain
		default:
			return 0, &net.OpError{Op: op, Net: "tcp", Err: errno}
		}
	}
}

// errAgain is syscall.EAGAIN as an interface, made once.
var errAgain error = syscall.EAGAIN
