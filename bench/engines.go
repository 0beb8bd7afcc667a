package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// engines runs the engines' own benchmarks, and the tests that hold what they allocate: for
// HTTP/1, HTTP/2, opaque bytes, and the multiplexing below all of them. They stand beside the
// engines, since they reach into them.
func engines(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-cpu=1", "-benchtime=1s", "-timeout=10m",
		"-run=Allocations|IdleSessionMemory|IdleConnection", "-bench=Pair|Opaque|Request|Bulk|IdleSession",
		"assay.dev/proxy/mux", "assay.dev/proxy/http1", "assay.dev/proxy/http2", "assay.dev/proxy")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	return nil
}
