package agent

import (
	"fmt"
	"os"
	"strings"
)

// inUserNamespace reports whether root here is somebody else outside.
func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295"
}

// OuterIDs returns who root of this user namespace is in the one outside of it.
func OuterIDs() (uid, gid int, err error) {
	for _, x := range []struct {
		file string
		id   *int
	}{{"/proc/self/uid_map", &uid}, {"/proc/self/gid_map", &gid}} {
		b, err := os.ReadFile(x.file)
		if err != nil {
			return 0, 0, err
		}
		var inside, n int
		if _, err := fmt.Sscan(string(b), &inside, x.id, &n); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", x.file, err)
		}
	}
	return uid, gid, nil
}

// Missing says, in sentences for a person, what of a host's isolation an agent that
// runs here does not have. It is empty for root on a host.
func Missing() []string {
	if !inUserNamespace() {
		return nil
	}
	list := []string{
		"Workloads, proxies and the agent run as the same user outside: whoever is that user can read and trace all of them.",
		"The mesh has a network of its own that is not joined to the machine's: workloads reach each other and nothing outside, and nothing outside reaches them.",
	}
	if !uidMapped(900000000) {
		list = append(list, "Proxies have no users of their own; capabilities and system calls are taken from them all the same.")
	}
	return list
}
