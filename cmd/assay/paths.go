package main

import (
	"os"
	"path/filepath"
)

// runtimeEnv leads every command of a shell to one agent and control.
const runtimeEnv = "ASSAY_RUNTIME"

// controlSocket is the operators' socket in the runtime folder. The agent's has its
// name in package agent.
const controlSocket = "control.sock"

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

// defaultRuntime is where sockets are: $ASSAY_RUNTIME if set, else /run/assay for
// root, else below $XDG_RUNTIME_DIR, else beside the state. Never in a folder where
// others may make one of that name first, and be taken for our agent.
func defaultRuntime() string {
	if dir := os.Getenv(runtimeEnv); dir != "" {
		return dir
	}
	return usualRuntime()
}

func usualRuntime() string {
	if os.Geteuid() == 0 {
		return "/run/assay"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "assay")
	}
	return filepath.Join(defaultData(), "run")
}

// defaultSocket is the operators' socket.
func defaultSocket() string { return filepath.Join(defaultRuntime(), controlSocket) }

// beside is the path of a binary that is installed in the same folder as this one.
func beside(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(self), name), nil
}
