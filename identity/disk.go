package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"assay.dev"
)

// folder is the authority's folder. Whoever else could read or replace a file in
// it could be anybody on the mesh, so every file is checked each time it is read,
// through the descriptor that is read from.
type folder struct {
	path string
	root *os.Root
}

func openFolder(path string) (*folder, error) {
	op := "open the authority's folder " + path
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	f := &folder{path: path, root: root}
	dir, err := root.Open(".")
	if err == nil {
		err = errors.Join(private(dir, path, 0o700), dir.Close())
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return f, nil
}

func (f *folder) close() error  { return f.root.Close() }
func (f *folder) where() string { return f.path }

func (f *folder) read() (*saved, map[string]*pair, error) {
	op := "open the authority in " + f.path
	b, err := f.readFile(stateFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil
	case err != nil:
		if _, ok := errors.AsType[*assay.Error](err); ok {
			return nil, nil, err
		}
		return nil, nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, nil, &assay.Error{Kind: assay.Internal, Op: op, Err: fmt.Errorf("%s: %w", stateFile, err), Remedy: "put the folder back from its backup"}
	}
	pairs, keep := map[string]*pair{}, map[string]bool{}
	for _, id := range s.State.ids() {
		if pairs[id], err = f.readPair(id); err != nil {
			return nil, nil, err
		}
		keep[id+".key"], keep[id+".crt"] = true, true
	}
	if err := f.sweep(keep); err != nil {
		return nil, nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	return &s, pairs, nil
}

// replace writes new pairs first, so that a crash leaves the old state or the new.
func (f *folder) replace(s saved, _, made map[string]*pair) (bool, error) {
	for _, p := range made {
		if err := f.writePair(p); err != nil {
			return false, err
		}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = f.write(stateFile, append(b, '\n'))
	}
	return err == nil, err
}

func (f *folder) forget(id string) error { return f.removePair(id) }

// private refuses a file that somebody else owns or can touch.
func private(file *os.File, path string, want fs.FileMode) error {
	op := "check " + path
	st, err := file.Stat()
	if err != nil {
		return &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	if st.Mode().IsDir() != (want == 0o700) || !st.Mode().IsDir() && !st.Mode().IsRegular() {
		return &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("is %s, not what the authority put there", st.Mode())}
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Geteuid() {
		return &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("belongs to uid %d, this process is uid %d", sys.Uid, os.Geteuid()),
			Remedy: fmt.Sprintf("if nobody else could have changed it: chown %d %s", os.Geteuid(), path)}
	}
	if st.Mode().Perm()&^want != 0 {
		return &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("mode is %04o, others may read or change it; want %04o", st.Mode().Perm(), want),
			Remedy: fmt.Sprintf("if no key leaked: chmod %04o %s; otherwise make a new mesh", want, path)}
	}
	return nil
}

// maxFile bounds a file of the authority.
const maxFile = 1 << 20

func (f *folder) readFile(name string) ([]byte, error) {
	file, err := f.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if err := private(file, f.path+"/"+name, 0o600); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("more than %d bytes", maxFile)
	}
	return b, err
}

// write replaces a file so that after a crash there is the old one or the new.
func (f *folder) write(name string, b []byte) error {
	var r [8]byte
	rand.Read(r[:])
	tmp := ".new-" + hex.EncodeToString(r[:])
	file, err := f.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = f.root.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, f.root.Remove(tmp))
	}
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// sweep removes files that are none of those kept: what a start before this one
// left behind half done.
func (f *folder) sweep(keep map[string]bool) error {
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		ours := strings.HasPrefix(n, ".new-") || strings.HasSuffix(n, ".key") || strings.HasSuffix(n, ".crt")
		if ours && !keep[n] {
			if err := f.root.Remove(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// pair is a certificate with its key.
type pair struct {
	id   string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (f *folder) writePair(p *pair) error {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return err
	}
	if err := f.write(p.id+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return err
	}
	return f.write(p.id+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}))
}

func (f *folder) readPair(id string) (*pair, error) {
	op := "read the authority's " + id
	fail := func(err error) (*pair, error) {
		if e, ok := errors.AsType[*assay.Error](err); ok {
			return nil, e
		}
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "put " + f.path + " back from its backup"}
	}
	b, err := f.readFile(id + ".crt")
	if err != nil {
		return fail(err)
	}
	p := &pair{id: id}
	if p.cert, err = parseCertificate(b); err != nil {
		return fail(err)
	}
	if b, err = f.readFile(id + ".key"); err != nil {
		return fail(err)
	}
	if p.key, err = parseKey(b); err != nil {
		return fail(err)
	}
	if !p.key.PublicKey.Equal(p.cert.PublicKey) {
		return fail(errors.New("the key is not that of the certificate"))
	}
	return p, nil
}

func (f *folder) removePair(id string) error {
	var errs []error
	for _, ext := range []string{".key", ".crt"} {
		if err := f.root.Remove(id + ext); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// onePEM finds the single block of a type, as people and tools write them: with
// text around it, CR LF, indented, without a last newline.
func onePEM(b []byte, types ...string) (*pem.Block, error) {
	lines := bytes.Split(bytes.ReplaceAll(b, []byte("\r"), nil), []byte("\n"))
	for i := range lines {
		lines[i] = bytes.TrimSpace(lines[i])
	}
	b = append(bytes.Join(lines, []byte("\n")), '\n')
	var found *pem.Block
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		for _, t := range types {
			if block.Type == t {
				if found != nil {
					return nil, fmt.Errorf("more than one %s in PEM", t)
				}
				found = block
			}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("no %s in PEM", types[0])
	}
	return found, nil
}

func parseCertificate(b []byte) (*x509.Certificate, error) {
	block, err := onePEM(b, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(block.Bytes)
}

// parseKey reads an ECDSA key as PKCS #8 or as SEC 1 (RFC 5915).
func parseKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, err := onePEM(b, "PRIVATE KEY", "EC PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	if block.Type == "EC PRIVATE KEY" {
		return x509.ParseECPrivateKey(block.Bytes)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, want an ECDSA key", key)
	}
	return ec, nil
}
