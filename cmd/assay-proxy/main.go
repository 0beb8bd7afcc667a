// Command assay-proxy is the data plane: one workload's proxy. An agent starts it in
// the workload's network namespace with its link on descriptor 3; it takes no other
// configuration. Before it speaks to anybody it gives up what it does not need of
// the kernel (package sandbox).
//
// Exit codes: 0 after a drain or SIGTERM, 1 otherwise, with the reason as the last
// line of its log (JSON, standard error).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"assay.dev/link"
	"assay.dev/proxy"
	"assay.dev/proxy/cores"
	"assay.dev/proxy/sandbox"
)

// linkFD is where the agent puts the link.
const linkFD = 3

// An agent executes the proxy through a descriptor, and the kernel would call it by that
// descriptor's number in ps and pgrep. The name of a process is its main thread's, on
// which init runs.
func init() {
	name := [16]byte{} // TASK_COMM_LEN
	copy(name[:], "assay-proxy")
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		if args[0] == "-version" && len(args) == 1 {
			fmt.Fprintln(stdout, "assay-proxy", build())
			return 0
		}
		fmt.Fprintln(stderr, "assay-proxy is started by `assay up`; it takes no arguments but -version")
		return 1
	}
	// Reading the machine's time zone would need a file.
	time.Local = time.UTC
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	debug.SetMemoryLimit(512 << 20)

	if err := serve(log); err != nil && !errors.Is(err, context.Canceled) {
		log.Error("stopped", "error", err)
		return 1
	}
	return 0
}

func serve(log *slog.Logger) error {
	conn, err := link.FileConn(os.NewFile(linkFD, "link"))
	if err != nil {
		return fmt.Errorf("%w (assay-proxy is started by `assay up`, with its link on descriptor %d)", err, linkFD)
	}
	notes, err := sandbox.Enter()
	if err != nil {
		conn.Close()
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go cores.Run(ctx) // until the process ends
	return proxy.New(conn, proxy.Options{Log: log, Build: build(), Notes: notes}).Run(ctx)
}

// version is set by the linker in a release.
var version string

// build is the version, or what the Go tool stamped.
func build() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			v += " " + s.Value[:12]
		}
	}
	return v
}
