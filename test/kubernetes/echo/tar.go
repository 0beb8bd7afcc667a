package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"strings"
)

// pack is what `kubectl cp` asks for when it copies out of a container: tar cf - FILE.
func pack(args []string) error {
	if len(args) < 3 || args[0] != "cf" || args[1] != "-" {
		return fmt.Errorf("tar %s: only cf - FILE", strings.Join(args, " "))
	}
	text, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	w := tar.NewWriter(os.Stdout)
	err = w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(args[2], "/"), Mode: 0o644, Size: int64(len(text))})
	if err == nil {
		_, err = w.Write(text)
	}
	return errors.Join(err, w.Close())
}
