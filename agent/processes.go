package agent

import (
	"fmt"
	"os"
	"slices"
	"strconv"

	"assay.dev/agent/attest"
)

// inNamespace holds all processes in a network namespace but except. The namespace
// is held by the caller, so its inode is nobody else's.
func inNamespace(inode uint64, except ...int) []*attest.Process {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	want := fmt.Sprintf("net:[%d]", inode)
	var list []*attest.Process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || slices.Contains(except, pid) || pid == os.Getpid() {
			continue
		}
		link := "/proc/" + name + "/ns/net"
		if got, err := os.Readlink(link); err != nil || got != want {
			continue
		}
		p, err := attest.Open(pid)
		if err != nil {
			continue
		}
		// Held now: what the link says next is about this process or about none.
		if got, err := os.Readlink(link); err != nil || got != want || !p.Alive() {
			p.Close()
			continue
		}
		list = append(list, p)
	}
	return list
}
