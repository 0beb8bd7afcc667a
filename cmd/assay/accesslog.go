package main

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"assay.dev"
)

// logFile is a file that is replaced when it is large: the last one is kept as NAME.1. A
// pipe, which somebody may read or not, stays what it is.
type logFile struct {
	name string
	most int64
	f    *os.File
	pipe bool
	size int64
}

const largestLog = 128 << 20

// openLogFile appends to a file that only its owner reads.
func openLogFile(name string, most int64) (*logFile, error) {
	l := &logFile{name: name, most: most}
	if err := l.open(); err != nil {
		return nil, &assay.Error{Op: "open the access log", Err: err, Remedy: "name a file in a folder that exists with --access-log"}
	}
	return l, nil
}

func (l *logFile) open() error {
	if st, err := os.Stat(l.name); err == nil && st.Mode()&fs.ModeNamedPipe != 0 {
		// Opened for both, it is there also while nobody reads.
		l.f, err = os.OpenFile(l.name, os.O_RDWR|syscall.O_NONBLOCK, 0)
		l.pipe = true
		return err
	}
	f, err := os.OpenFile(l.name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Write appends a line. One that does not fit on the disk is taken back, so that the
// lines before and after it can be read.
func (l *logFile) Write(p []byte) (int, error) {
	if l.pipe {
		return l.f.Write(p)
	}
	if l.f == nil || l.size+int64(len(p)) > l.most {
		if err := l.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(p)
	if err != nil {
		l.f.Truncate(l.size)
		return 0, err
	}
	l.size += int64(n)
	return n, nil
}

func (l *logFile) rotate() error {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
	if err := os.Rename(l.name, l.name+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return l.open()
}
