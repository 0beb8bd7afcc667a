package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// sysctl is one setting below /proc/sys/net of the calling thread's namespace.
type sysctl struct {
	name, value string
	optional    bool // the kernel may lack it, or a user namespace may not allow it
}

func set(list ...sysctl) error {
	for _, s := range list {
		path := filepath.Join("/proc/sys/net", s.name)
		if old, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(old)) == s.value {
			continue
		}
		// No O_CREATE: what is not there is not a setting.
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(s.value)
			err = errors.Join(err, f.Close())
		}
		if err != nil && !s.optional {
			return fmt.Errorf("set %s to %s: %w", path, s.value, err)
		}
	}
	return nil
}

// haveIPv6 reports whether the kernel has IPv6 at all.
func haveIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
