package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"assay.dev"
)

// ListenSocket opens the operators' unix socket at path: for this user and root,
// and for the members of group viewers if that is not 0. A socket that nobody
// listens on is replaced; its folder is made.
func ListenSocket(path string, viewers int) (net.Listener, error) {
	op := "open the operators' socket " + path
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "choose another with --socket"}
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return nil, &assay.Error{Kind: assay.Conflict, Op: op, Err: errors.New("there is something else of this name"), Remedy: "move it away, or choose another with --socket"}
		}
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			conn.Close()
			return nil, &assay.Error{Kind: assay.Conflict, Op: op, Err: errors.New("somebody listens on it"), Remedy: "stop that one, or choose another with --socket"}
		}
		if err := os.Remove(path); err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "choose another with --socket"}
	}
	mode := fs.FileMode(0o600)
	if viewers != 0 {
		mode = 0o660
		err = os.Chown(path, -1, viewers)
	}
	if err = errors.Join(err, os.Chmod(path, mode)); err != nil {
		return nil, errors.Join(&assay.Error{Kind: assay.Internal, Op: op, Err: fmt.Errorf("group %d: %w", viewers, err)}, l.Close())
	}
	return l, nil
}
