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
	want := fmt.Sprintf("net:[%d]", inode)
	var list []*attest.Process
	for _, pid := range pids() {
		if slices.Contains(except, pid) || pid == os.Getpid() {
			continue
		}
		link := fmt.Sprintf("/proc/%d/ns/net", pid)
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

// pids are the processes that this namespace of processes has.
func pids() (list []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			list = append(list, pid)
		}
	}
	return list
}
