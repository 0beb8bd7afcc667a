package lab

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Capture watches every packet on every link of a network namespace but lo, and
// counts those that hold a marker. On the lab's host that is the wire between
// all hosts and workloads.
type Capture struct {
	fd     int
	file   *os.File
	marker []byte
	done   chan struct{}

	mu      sync.Mutex
	packets int
	bytes   int
	found   int
	first   string
}

// Capture begins to watch. The marker should be short and sent often, so that it
// is whole in some packet.
func (s *Space) Capture(t TB, marker string) *Capture {
	t.Helper()
	return Watch(t, s.In, marker)
}

// Watch is Capture where there is no Space: in runs a function in the namespace.
func Watch(t TB, in func(func() error) error, marker string) *Capture {
	t.Helper()
	c := &Capture{marker: []byte(marker), done: make(chan struct{})}
	err := in(func() (err error) {
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		return unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 128<<20)
	})
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	c.file = os.NewFile(uintptr(c.fd), "packets")
	go c.run()
	t.Cleanup(c.Close)
	return c
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) run() {
	defer close(c.done)
	buf := make([]byte, 128<<10)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n int
		var from unix.Sockaddr
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, rerr = unix.Recvfrom(int(fd), buf, 0)
			return rerr != unix.EAGAIN
		})
		if err != nil {
			return
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if rerr != nil || !ok || ll.Hatype == unix.ARPHRD_LOOPBACK {
			continue
		}
		c.packet(buf[:n], ll)
	}
}

func (c *Capture) packet(p []byte, ll *unix.SockaddrLinklayer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets++
	c.bytes += len(p)
	if i := bytes.Index(p, c.marker); i >= 0 {
		c.found++
		if c.first == "" {
			c.first = fmt.Sprintf("interface %d, %s: %q", ll.Ifindex, describe(p), p[max(0, i-64):min(len(p), i+128)])
		}
	}
}

// describe names the ends of a packet.
func describe(p []byte) string {
	if len(p) < 14 {
		return "short frame"
	}
	kind, p := binary.BigEndian.Uint16(p[12:]), p[14:]
	port := func(p []byte) (src, dst uint16) {
		if len(p) < 4 {
			return 0, 0
		}
		return binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
	}
	switch {
	case kind == unix.ETH_P_IP && len(p) >= 20:
		src, dst := port(p[int(p[0]&15)*4:])
		return fmt.Sprintf("%d.%d.%d.%d:%d -> %d.%d.%d.%d:%d", p[12], p[13], p[14], p[15], src, p[16], p[17], p[18], p[19], dst)
	case kind == unix.ETH_P_IPV6 && len(p) >= 40:
		src, dst := port(p[40:])
		return fmt.Sprintf("[%x]:%d -> [%x]:%d", p[8:24], src, p[24:40], dst)
	}
	return fmt.Sprintf("ethertype %04x", kind)
}

// Seen returns how many packets were watched, how many of them held the marker,
// and a description of the first of these.
func (c *Capture) Seen() (packets, found int, first string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.packets, c.found, c.first
}

// Settle waits until the kernel has handed over everything that was on the wire
// when it was called, and fails the test when packets were lost: a capture with
// holes proves nothing.
func (c *Capture) Settle(t TB) {
	t.Helper()
	last, empty := -1, -1 // packets seen: at the last look, and when nothing was queued
	Eventually(t, 30*time.Second, "the capture comes to rest", func() error {
		queued, err := unix.IoctlGetInt(c.fd, unix.SIOCINQ)
		n, _, _ := c.Seen()
		switch {
		case err != nil:
			return err
		case queued == 0 && n == last:
			return nil
		case empty >= 0 && n > empty:
			return nil // then one at most was read and not yet seen, and it is now
		case queued == 0 && empty < 0:
			empty = n
		}
		last = n
		return fmt.Errorf("%d bytes are queued", queued)
	})
	stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		t.Fatalf("capture: statistics: %v", err)
	}
	if stats.Drops > 0 {
		t.Fatalf("capture: %d packets were lost", stats.Drops)
	}
}

// ExpectNone fails the test when the marker was on the wire.
func (c *Capture) ExpectNone(t TB) {
	t.Helper()
	c.Settle(t)
	packets, found, first := c.Seen()
	if found > 0 {
		t.Errorf("plaintext on the wire: %d of %d packets; the first: %s", found, packets, first)
	}
}

// Close ends the capture.
func (c *Capture) Close() {
	c.file.Close()
	<-c.done
}
