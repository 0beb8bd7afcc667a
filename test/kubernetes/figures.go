package kubernetes

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Figures are what bringing a cluster up has cost.
type Figures struct {
	Steps []Step
	Took  time.Duration // without compiling
}

// Step is one of the steps, in the order of their ends.
type Step struct {
	Name string
	At   time.Duration // since the beginning
}

// figure notes that a step has ended.
func (c *Cluster) figure(step string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := time.Since(c.began)
	c.Figures.Steps = append(c.Figures.Steps, Step{step, at})
	c.Figures.Took = at
}

func (f Figures) String() string {
	var s strings.Builder
	for i, step := range f.Steps {
		if i > 0 {
			s.WriteString(", ")
		}
		fmt.Fprintf(&s, "%s %.1fs", step.Name, step.At.Seconds())
	}
	return s.String()
}

// Use is what a program of a cluster uses now.
type Use struct {
	Machine, Program string
	Memory           int64 // bytes; what is shared is divided by those who share it
	CPU              time.Duration
}

// Uses tells what the programs of a running cluster use. Everything else on a
// machine (the containers and their shims) is one entry, named "pods".
func Uses(name string) ([]Use, error) {
	in, err := hierarchies()
	if err != nil {
		return nil, err
	}
	clusters, err := clustersFolder()
	if err != nil {
		return nil, err
	}
	group := groupName(filepath.Join(clusters, name))
	known := map[string]bool{
		"etcd": true, "kube-apiserver": true, "kube-controller-manager": true, "kube-scheduler": true,
		"kubelet": true, "kube-proxy": true, "containerd": true,
	}
	var list []Use
	for _, machine := range append([]string{"control"}, "node-1", "node-2", "node-3") {
		pods := Use{Machine: machine, Program: "pods"}
		for _, pid := range (&cgroup{name: filepath.Join(group, machine), in: in}).processes() {
			u, err := use(pid)
			if err != nil {
				continue // it has just ended
			}
			u.Machine = machine
			if known[u.Program] {
				list = append(list, u)
			} else {
				pods.Memory += u.Memory
				pods.CPU += u.CPU
			}
		}
		if pods.Memory > 0 {
			list = append(list, pods)
		}
	}
	return list, nil
}

// use reads proc(5).
func use(pid int) (Use, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	cmdline, err := os.ReadFile(dir + "/cmdline")
	if err != nil {
		return Use{}, err
	}
	first, _, _ := bytes.Cut(cmdline, []byte{0})
	u := Use{Program: filepath.Base(string(first))}
	rollup, err := os.ReadFile(dir + "/smaps_rollup")
	if err != nil {
		return Use{}, err
	}
	for line := range strings.Lines(string(rollup)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			u.Memory = kib << 10
		}
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return Use{}, err
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) > 12 {
		user, _ := strconv.ParseInt(f[11], 10, 64)
		system, _ := strconv.ParseInt(f[12], 10, 64)
		u.CPU = time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 on every architecture of Go's
	}
	return u, nil
}

// Table is a table of uses for people.
func Table(uses []Use) string {
	var out bytes.Buffer
	w := bufio.NewWriter(&out)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MACHINE\tPROGRAM\tMEMORY\tCPU SO FAR")
	var memory int64
	for _, u := range uses {
		fmt.Fprintf(t, "%s\t%s\t%d MB\t%.1f s\n", u.Machine, u.Program, u.Memory>>20, u.CPU.Seconds())
		memory += u.Memory
	}
	fmt.Fprintf(t, "all\t\t%d MB\t\n", memory>>20)
	t.Flush()
	w.Flush()
	return out.String()
}
