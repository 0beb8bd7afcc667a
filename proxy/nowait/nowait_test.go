package nowait

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"assay.dev/proxy/pairtest"
)

// on runs f once with c's descriptor.
func on(t *testing.T, c *net.TCPConn, f func(fd uintptr)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(f)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestTransfer(t *testing.T) {
	a, b := pairtest.TCP(t)
	buf := make([]byte, 1<<20)
	on(t, a, func(fd uintptr) {
		if n, err := Read(fd, buf); n != 0 || err != Again {
			t.Errorf("nothing to read: %d %v", n, err)
		}
		if n, err := Read(fd, nil); n != 0 || err != nil {
			t.Errorf("empty read: %d %v", n, err)
		}
	})
	sent := 0
	on(t, a, func(fd uintptr) {
		for {
			n, err := Write(fd, buf)
			sent += n
			if err != nil {
				t.Errorf("write: %v", err)
			}
			if n < len(buf) {
				return // full
			}
		}
	})
	got, err := io.ReadFull(b, make([]byte, sent))
	if got != sent || err != nil {
		t.Errorf("%d of %d bytes arrived, %v", got, sent, err)
	}
	if _, err := b.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	b.CloseWrite()
	raw, _ := a.SyscallConn()
	var text bytes.Buffer
	end := raw.Read(func(fd uintptr) bool {
		for { // until there is nothing: readiness is told once
			n, err := Read(fd, buf)
			text.Write(buf[:n])
			if n == 0 {
				return err == nil
			}
		}
	})
	if end != nil || text.String() != "bye" {
		t.Errorf("%q %v", text.String(), end)
	}
}

func TestReset(t *testing.T) {
	a, b := pairtest.TCP(t)
	b.SetLinger(0)
	b.Close()
	raw, _ := a.SyscallConn()
	var err error
	raw.Read(func(fd uintptr) bool {
		_, err = Read(fd, make([]byte, 1))
		return err != Again
	})
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read after a reset: %v", err)
	}
	on(t, a, func(fd uintptr) {
		if n, err := Write(fd, []byte("x")); n != 0 || !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after a reset: %d %v", n, err)
		}
	})
}

func TestAllocations(t *testing.T) {
	a, _ := pairtest.TCP(t)
	buf := make([]byte, 16)
	on(t, a, func(fd uintptr) {
		if n := testing.AllocsPerRun(100, func() { Read(fd, buf); Write(fd, buf) }); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
