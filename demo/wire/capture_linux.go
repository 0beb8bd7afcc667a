package wire

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel's ring: blocks that it fills with packets and hands over when they are
// full or old. One segment that is still to be cut by a device has up to 64 KiB.
const (
	blockSize  = 1 << 20
	blocks     = 32
	blockAge   = 20 * time.Millisecond
	arpLoop    = 772  // ARPHRD_LOOPBACK
	ethAll     = 0x03 // ETH_P_ALL
	tpacketV3  = 2
	settleTime = 5 * blockAge
)

// Capture sees every packet on every link of one network namespace, except loopback.
type Capture struct {
	fd   int
	ring []byte
	wake int // eventfd that ends the wait
	in   *Inspector
}

// Open begins to capture in the network namespace of the calling thread, which needs
// CAP_NET_RAW there. What is captured before Run is kept in the ring.
func Open(in *Inspector) (*Capture, error) {
	c := &Capture{fd: -1, wake: -1, in: in}
	if err := c.open(); err != nil {
		c.Close()
		return nil, fmt.Errorf("capture packets: %w", err)
	}
	return c, nil
}

func (c *Capture) open() (err error) {
	// Without a protocol nothing arrives until bind, when the ring is there.
	if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.SOL_PACKET, unix.PACKET_VERSION, tpacketV3); err != nil {
		return fmt.Errorf("TPACKET_V3: %w", err)
	}
	req := unix.TpacketReq3{Block_size: blockSize, Block_nr: blocks, Frame_size: 1 << 17, Frame_nr: blocks * blockSize >> 17,
		Retire_blk_tov: uint32(blockAge / time.Millisecond)}
	if err := unix.SetsockoptTpacketReq3(c.fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return fmt.Errorf("ring of %d MiB: %w", blocks*blockSize>>20, err)
	}
	if c.ring, err = unix.Mmap(c.fd, 0, blocks*blockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map the ring: %w", err)
	}
	if c.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	var proto [2]byte
	binary.BigEndian.PutUint16(proto[:], ethAll)
	return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(proto[:])})
}

// Run feeds the inspector until ctx ends and everything captured before that has been
// inspected.
func (c *Capture) Run(ctx context.Context) error {
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		unix.Write(c.wake, one[:])
	})
	defer func() {
		if !stop() {
			<-woken // it uses what Close frees
		}
	}()
	timeout, end := -1, time.Time{}
	for block := 0; ; {
		if c.block(block) {
			block = (block + 1) % blocks
			continue
		}
		if err := c.missed(); err != nil {
			return err
		}
		if !end.IsZero() && time.Now().After(end) {
			return nil
		}
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN | unix.POLLERR}, {Fd: int32(c.wake), Events: unix.POLLIN}}
		if !end.IsZero() {
			fds = fds[:1]
		}
		if _, err := unix.Poll(fds, timeout); err != nil && err != unix.EINTR {
			return fmt.Errorf("capture packets: poll: %w", err)
		}
		if ctx.Err() != nil && end.IsZero() {
			// The block that is being filled is handed over within blockAge.
			timeout, end = int(blockAge/time.Millisecond), time.Now().Add(settleTime)
		}
	}
}

// block inspects one block, if the kernel has handed it over, and gives it back.
func (c *Capture) block(n int) bool {
	b := c.ring[n*blockSize : (n+1)*blockSize]
	desc := (*unix.TpacketBlockDesc)(unsafe.Pointer(&b[0]))
	hdr := (*unix.TpacketHdrV1)(unsafe.Pointer(&desc.Hdr[0]))
	if atomic.LoadUint32(&hdr.Block_status)&unix.TP_STATUS_USER == 0 {
		return false
	}
	at := hdr.Offset_to_first_pkt
	for range hdr.Num_pkts {
		p := (*unix.Tpacket3Hdr)(unsafe.Pointer(&b[at]))
		from := (*unix.RawSockaddrLinklayer)(unsafe.Pointer(&b[at+tpacketAlign(unix.SizeofTpacket3Hdr)]))
		if from.Hatype != arpLoop {
			data := b[at+uint32(p.Net):]
			c.in.Packet(data[:min(int(p.Snaplen), len(data))], p.Snaplen < p.Len)
		}
		at += p.Next_offset
	}
	atomic.StoreUint32(&hdr.Block_status, unix.TP_STATUS_KERNEL)
	return true
}

func tpacketAlign(n uint32) uint32 {
	return (n + unix.TPACKET_ALIGNMENT - 1) &^ (unix.TPACKET_ALIGNMENT - 1)
}

// missed tells the inspector what the kernel dropped since the last time.
func (c *Capture) missed() error {
	st, err := unix.GetsockoptTpacketStatsV3(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return fmt.Errorf("capture packets: statistics: %w", err)
	}
	if st.Drops > 0 {
		c.in.Missed(uint64(st.Drops))
	}
	return nil
}

// Close frees the ring. Run must have returned.
func (c *Capture) Close() error {
	if c.ring != nil {
		unix.Munmap(c.ring)
		c.ring = nil
	}
	for _, fd := range []int{c.fd, c.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	c.fd, c.wake = -1, -1
	return nil
}
