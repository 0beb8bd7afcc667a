package lab

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// state is what programs can leave behind on a host, in lines that can be compared.
type state []string

// state reads the lab as it is.
func (l *Lab) state() (state, error) {
	var s state
	for _, p := range l.Processes() {
		s = append(s, fmt.Sprintf("process %s (%d)", p.Command, p.PID))
	}
	ctx := context.Background()
	for _, cmd := range [][]string{
		{"ip", "-o", "link"}, {"ip", "-o", "addr"}, {"ip", "rule"}, {"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"},
		{"nft", "list", "ruleset"}, {"ip", "netns"},
	} {
		out, err := l.Try(ctx, cmd...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			s = append(s, strings.Join(cmd, " ")+": "+stable(line))
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", l.init.Process.Pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		s = append(s, "mount "+strings.TrimSpace(line))
	}
	for _, dir := range []string{"/run", "/tmp", "/var/tmp", "/dev/shm"} {
		filepath.WalkDir(l.Path(dir), func(path string, d fs.DirEntry, err error) error {
			inside := strings.TrimPrefix(path, l.Path("/"))
			if err != nil || inside == root {
				return fs.SkipDir
			}
			s = append(s, "file "+inside)
			return nil
		})
	}
	return s, nil
}

// stable takes what changes by itself out of a line of ip's.
func stable(line string) string {
	field := strings.Fields(line)
	for i, f := range field {
		switch f {
		case "state", "valid_lft", "preferred_lft", "expires":
			if i+1 < len(field) {
				field[i+1] = "*"
			}
		}
		if strings.HasPrefix(f, "<") && strings.HasSuffix(f, ">") {
			field[i] = "<>"
		}
		if f == "linkdown" {
			field[i] = ""
		}
	}
	return strings.Join(slices.DeleteFunc(field, func(f string) bool { return f == "" }), " ")
}

// Leaks returns what is there now and was not when the lab was made, except what
// the test itself made (hosts on the uplink and programs it still runs).
func (l *Lab) Leaks() ([]string, error) {
	now, err := l.state()
	if err != nil {
		return nil, err
	}
	var left []string
	for _, line := range now {
		if !slices.Contains(l.before, line) && !strings.Contains(line, " node") && !strings.Contains(line, uplinkName) {
			left = append(left, line)
		}
	}
	return left, nil
}

// ProcessInfo is a running process of a lab.
type ProcessInfo struct {
	PID     int // as numbered here
	Parent  int
	State   string // as in proc(5)
	Exe     string // inside the lab
	Command string
	Net     string // what /proc/PID/ns/net links to
}

// Processes lists what runs in the lab besides its process 1.
func (l *Lab) Processes() []ProcessInfo {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var list []ProcessInfo
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == l.init.Process.Pid {
			continue
		}
		dir := "/proc/" + e.Name()
		if ns, err := os.Readlink(dir + "/ns/pid"); err != nil || ns != l.pidns {
			continue
		}
		p := ProcessInfo{PID: pid}
		p.Exe, _ = os.Readlink(dir + "/exe")
		p.Net, _ = os.Readlink(dir + "/ns/net")
		cmdline, _ := os.ReadFile(dir + "/cmdline")
		p.Command = strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
		stat, _ := os.ReadFile(dir + "/stat")
		if _, rest, ok := strings.Cut(string(stat), ") "); ok {
			if f := strings.Fields(rest); len(f) > 1 {
				if p.State = f[0]; p.State == "Z" {
					p.Command = "(ended, not waited for) " + p.Command
				}
				p.Parent, _ = strconv.Atoi(f[1])
			}
		}
		list = append(list, p)
	}
	return list
}

// Children lists the processes below pid, all generations.
func (l *Lab) Children(pid int) []ProcessInfo {
	below := map[int]bool{pid: true}
	var list []ProcessInfo
	all := l.Processes()
	for found := true; found; {
		found = false
		for _, p := range all {
			if below[p.Parent] && !below[p.PID] {
				below[p.PID], found = true, true
				list = append(list, p)
			}
		}
	}
	return list
}
