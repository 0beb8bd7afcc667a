// Package nowait calls the kernel about non-blocking sockets without telling the Go
// scheduler.
//
// An announced system call (syscall.Read, net.Conn.Read) prepares for its thread to
// block, and when the process is otherwise idle it also wakes the runtime's monitor
// thread, which then polls for a while: at one request at a time that was a third of
// the proxy's CPU. A call on a non-blocking descriptor cannot block, so there is
// nothing to announce.
//
// One call in 4096 is announced all the same. The monitor is what takes a processor
// away from a goroutine that never has to wait, and what looks at the network
// meanwhile; when it sleeps only an announced call wakes it, and then it stays until
// the process is idle once more.
//
// It refuses nothing and knows no protocol: the caller has the descriptor from
// syscall.RawConn, whose Read and Write wait for readiness, and it is non-blocking,
// as all of package net's are. There are no goroutines here.
//
// Tour: nowait.go (the calls), conn.go (accepting connections, and what they are).
package nowait

import (
	"net"
	"sync/atomic"
	"syscall"
	"unsafe"
)

const announceEvery = 1 << 12

var calls atomic.Uint32

// Again says that the kernel has nothing to read now.
var Again error = syscall.EAGAIN

// Read reads once. It returns Again when there is nothing, and 0 without an error at
// the end of the stream. An empty p reads nothing.
func Read(fd uintptr, p []byte) (int, error) {
	return transfer(syscall.SYS_READ, "read", fd, p, 0)
}

// Peek is Read that takes nothing away.
func Peek(fd uintptr, p []byte) (int, error) {
	return transfer(syscall.SYS_RECVFROM, "recv", fd, p, syscall.MSG_PEEK)
}

// Write writes once. n < len(p) without an error means that the kernel takes no more
// now.
func Write(fd uintptr, p []byte) (n int, err error) {
	if n, err = transfer(syscall.SYS_WRITE, "write", fd, p, 0); err == Again {
		err = nil
	}
	return n, err
}

// WriteMore is Write for bytes that more will follow, or the end of what is sent. The
// kernel may keep them back until then, for them to leave in the same segment, or until
// Push.
func WriteMore(fd uintptr, p []byte) (n int, err error) {
	if n, err = transfer(syscall.SYS_SENDTO, "write", fd, p, syscall.MSG_MORE|syscall.MSG_NOSIGNAL); err == Again {
		err = nil
	}
	return n, err
}

// Push has what WriteMore wrote leave now.
func Push(fd uintptr) error { return setOption(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1) }

func setOption(fd uintptr, level, name int, v int32) error {
	_, _, errno := syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return failed("setsockopt", errno)
}

func failed(op string, errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Err: errno}
}

func transfer(call uintptr, op string, fd uintptr, p []byte, flags uintptr) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		var n uintptr
		var errno syscall.Errno
		if calls.Add(1)%announceEvery != 0 {
			n, _, errno = syscall.RawSyscall6(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		} else {
			n, _, errno = syscall.Syscall6(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		}
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, Again
		default:
			return 0, failed(op, errno)
		}
	}
}
