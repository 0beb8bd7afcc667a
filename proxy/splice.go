package proxy

import (
	"os"
	"syscall"

	"assay.dev/proxy/golden"
	"assay.dev/proxy/nowait"
	"golang.org/x/sys/unix"
)

// splice carries bytes between two plain connections until both directions ended,
// by splice(2): they never enter this process. Ends are passed on one by one, and a
// reset on one side becomes a reset on the other. It reports whether both ended well.
func (p *Proxy) splice(app, peer nowait.Conn, series *golden.Series) bool {
	back := make(chan error, 1)
	p.wg.Go(func() { back <- p.carry(app, peer, series.In) })
	err := p.carry(peer, app, series.Out)
	if e := <-back; err == nil {
		err = e
	}
	app.Close() // closed already when a direction was aborted
	peer.Close()
	return err == nil
}

// carry copies one direction. When it fails both connections are aborted, which
// ends the other direction too.
func (p *Proxy) carry(to, from nowait.Conn, count func(int)) error {
	err := p.spliceAll(to, from, count)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		abort(to)
		abort(from)
	}
	return err
}

// spliceBatch is what one turn moves at most: what a pipe holds by default.
const spliceBatch = 64 << 10

// kernelPipe is a pipe that bytes pass through inside the kernel.
type kernelPipe struct{ r, w int }

// kernelPipes are those not in use. A direction borrows one only while bytes move,
// so an idle connection costs no descriptors.
type kernelPipes chan kernelPipe

func (k kernelPipes) get() (kernelPipe, error) {
	select {
	case kp := <-k:
		return kp, nil
	default:
	}
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return kernelPipe{}, os.NewSyscallError("pipe2", err)
	}
	return kernelPipe{fd[0], fd[1]}, nil
}

// put takes back an empty pipe.
func (k kernelPipes) put(kp kernelPipe) {
	select {
	case k <- kp:
	default:
		kp.close()
	}
}

func (kp kernelPipe) close() {
	unix.Close(kp.r)
	unix.Close(kp.w)
}

// closeAll empties the store.
func (k kernelPipes) closeAll() {
	for {
		select {
		case kp := <-k:
			kp.close()
		default:
			return
		}
	}
}

// mover is one direction of a splice.
type mover struct {
	pipes    kernelPipes
	kp       kernelPipe
	borrowed bool
	n        int // in the pipe
	end      bool
	err      error
}

func (p *Proxy) spliceAll(to, from nowait.Conn, count func(int)) error {
	src, err := from.SyscallConn()
	if err != nil {
		return err
	}
	dst, err := to.SyscallConn()
	if err != nil {
		return err
	}
	m := &mover{pipes: p.pipes}
	fill, empty := m.fill, m.empty
	for !m.end {
		if err = move(src.Read, fill, m); err != nil || m.end {
			break
		}
		n := m.n
		if err = move(dst.Write, empty, m); err != nil {
			break
		}
		count(n)
		m.pipes.put(m.kp)
		m.borrowed = false
	}
	switch {
	case !m.borrowed:
	case m.n == 0:
		m.pipes.put(m.kp)
	default:
		m.kp.close()
	}
	return err
}

func move(wait func(func(uintptr) bool) error, f func(uintptr) bool, m *mover) error {
	if err := wait(f); err != nil {
		return err
	}
	return m.err
}

// fill moves what the socket has into a pipe, and waits for the socket without one.
func (m *mover) fill(fd uintptr) bool {
	if !m.borrowed {
		if m.kp, m.err = m.pipes.get(); m.err != nil {
			return true
		}
		m.borrowed = true
	}
	for {
		n, err := unix.Splice(int(fd), nil, m.kp.w, nil, spliceBatch, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch err {
		case nil:
			m.n, m.end = int(n), n == 0
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			m.pipes.put(m.kp)
			m.borrowed = false
			return false
		default:
			m.err = os.NewSyscallError("splice", err)
			return true
		}
	}
}

// empty moves what is in the pipe to the other socket.
func (m *mover) empty(fd uintptr) bool {
	for m.n > 0 {
		n, err := unix.Splice(m.kp.r, nil, int(fd), nil, m.n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch err {
		case nil:
			m.n -= int(n)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			m.err = os.NewSyscallError("splice", err)
			return true
		}
	}
	return true
}
