package link

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("link: control message: %w", err)
	}
	var files []int
	for i := range list {
		if list[i].Header.Level != unix.SOL_SOCKET || list[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fd, err := unix.ParseUnixRights(&list[i])
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("link: descriptors: %w", err)
		}
		files = append(files, fd...)
	}
	for _, fd := range files {
		unix.CloseOnExec(fd)
	}
	return files, nil
}

// closeAll closes what a peer sent. A socket that lingers would hold up whoever closes
// it last, for as long as its sender likes (socket(7)).
func closeAll(fds []int) {
	for _, fd := range fds {
		if fd < 0 {
			continue
		}
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
		unix.Close(fd)
	}
}

const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL

// sealedCopy returns a memfd that holds b and can no longer change.
func sealedCopy(b []byte) (int, error) {
	if len(b) > maxBody {
		return -1, fmt.Errorf("%d bytes, at most %d", len(b), maxBody)
	}
	fd, err := unix.MemfdCreate("assay", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("memfd: %w", err)
	}
	for off := 0; off < len(b); {
		n, err := unix.Write(fd, b[off:])
		if err != nil && err != unix.EINTR {
			unix.Close(fd)
			return -1, fmt.Errorf("memfd: %w", err)
		}
		off += max(n, 0)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("memfd: seal: %w", err)
	}
	return fd, nil
}

// sealedMapping maps a descriptor that its sender can no longer change: without
// the seals a peer could shrink it under the reader.
func sealedMapping(fd int, most int64) ([]byte, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&(unix.F_SEAL_SHRINK|unix.F_SEAL_WRITE) != unix.F_SEAL_SHRINK|unix.F_SEAL_WRITE {
		return nil, fmt.Errorf("descriptor is not a sealed memfd")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Size > most {
		return nil, fmt.Errorf("%d bytes, at most %d", st.Size, most)
	}
	if st.Size == 0 {
		return nil, nil
	}
	return unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
}

func readAll(fd int, most int64) ([]byte, error) {
	m, err := sealedMapping(fd, most)
	if err != nil || m == nil {
		return nil, err
	}
	b := append([]byte(nil), m...)
	runtime.KeepAlive(m)
	return b, unix.Munmap(m)
}
