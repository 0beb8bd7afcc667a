package main

import (
	"os"
	"path/filepath"
	"strconv"
)

// defaultData is where a role keeps its state: /var/lib/assay for root, else where
// the XDG base directory specification says.
func defaultData() string {
	if os.Geteuid() == 0 {
		return "/var/lib/assay"
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "assay")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = "."
	}
	return filepath.Join(home, ".local", "state", "assay")
}

// defaultRuntime is where sockets are.
func defaultRuntime() string {
	if os.Geteuid() == 0 {
		return "/run/assay"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "assay")
	}
	return filepath.Join(os.TempDir(), "assay-"+strconv.Itoa(os.Geteuid()))
}

// defaultSocket is the operators' socket.
func defaultSocket() string { return filepath.Join(defaultRuntime(), "control.sock") }
