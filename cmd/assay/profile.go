//go:build assay_profile

package main

import (
	"fmt"
	"net"
	"net/http"
	_ "net/http/pprof"
	"os"
)

// init serves profiles (net/http/pprof) on the unix socket $ASSAY_PROFILE, in a program that
// was compiled to be measured.
func init() {
	path := os.Getenv("ASSAY_PROFILE")
	if path == "" {
		return
	}
	os.Remove(path) // of the process before
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "profiles:", err)
		os.Exit(1)
	}
	go http.Serve(l, nil)
}
