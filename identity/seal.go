package identity

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// Vault keeps the document of an authority that several processes share. It sees only
// what is sealed. Its methods are called by one goroutine at a time.
type Vault interface {
	// Load returns the document; nil: there is none.
	Load(ctx context.Context) ([]byte, error)
	// Swap stores next, durably, if the document still is old (nil: if there is none).
	// Otherwise it changes nothing and returns false.
	Swap(ctx context.Context, old, next []byte) (swapped bool, err error)
}

// SealingKeys are what a shared authority is sealed under: the first one seals, each of
// them opens. They are never kept with what they seal.
type SealingKeys struct{ list [][keySize]byte }

const keySize = 32

// NewSealingKey makes a key, as ParseSealingKeys reads it.
func NewSealingKey() string {
	var key [keySize]byte
	rand.Read(key[:]) // never fails (crypto/rand)
	return base64.StdEncoding.EncodeToString(key[:]) + "\n"
}

// ParseSealingKeys reads keys, one a line: 32 bytes in base64. To replace one, put the new
// one above it, let every control start again, and remove it when the authority was
// stored next (at the latest with the next intermediate).
func ParseSealingKeys(text []byte) (*SealingKeys, error) {
	keys := &SealingKeys{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		raw, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(raw) != keySize {
			return nil, &assay.Error{Kind: assay.Invalid, Op: "read the authority's sealing key", Err: fmt.Errorf("line %d is not %d bytes in base64", len(keys.list)+1, keySize),
				Remedy: "make one: head -c 32 /dev/urandom | base64"}
		}
		keys.list = append(keys.list, [keySize]byte(raw))
	}
	if len(keys.list) == 0 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read the authority's sealing key", Err: errors.New("there is none"), Remedy: "make one: head -c 32 /dev/urandom | base64"}
	}
	return keys, nil
}

// ReadSealingKeys reads them from a file that nobody else may read.
func ReadSealingKeys(path string) (*SealingKeys, error) {
	op := "read the authority's sealing key " + path
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: err,
			Remedy: "make it once, and give each control of this store the same: (umask 077; head -c 32 /dev/urandom | base64 > " + path + ")"}
	}
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	defer file.Close()
	if err := private(file, path, 0o600); err != nil {
		return nil, err
	}
	text := make([]byte, 4096)
	n, err := file.Read(text)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	}
	return ParseSealingKeys(text[:n])
}

// sealMark begins a sealed document, before the mark of the key that sealed it.
const sealMark = "assay authority 1\n"

const markSize = 8 // of a key

func mark(key *[keySize]byte) []byte {
	sum := sha256.Sum256(append([]byte("assay sealing key\x00"), key[:]...))
	return sum[:markSize]
}

func aead(key *[keySize]byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// seal encrypts with AES-256-GCM under the first key; what stands before the ciphertext
// is authenticated with it.
func (k *SealingKeys) seal(plain []byte) ([]byte, error) {
	key := &k.list[0]
	g, err := aead(key)
	if err != nil {
		return nil, err
	}
	head := slices.Concat([]byte(sealMark), mark(key))
	return g.Seal(slices.Clone(head), nil, plain, head), nil
}

func (k *SealingKeys) open(sealed []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(sealed, []byte(sealMark))
	if !ok || len(rest) < markSize {
		return nil, errors.New("it is not a sealed authority")
	}
	head := sealed[:len(sealMark)+markSize]
	for i := range k.list {
		if !bytes.Equal(mark(&k.list[i]), rest[:markSize]) {
			continue
		}
		g, err := aead(&k.list[i])
		if err != nil {
			return nil, err
		}
		plain, err := g.Open(nil, nil, rest[markSize:], head)
		if err != nil {
			return nil, errors.New("it was changed after it was sealed")
		}
		return plain, nil
	}
	return nil, errors.New("it was sealed under another key")
}

// sealed keeps an authority in a vault, all of it in one document: what is stored is one
// step of rotation or the next, never between.
type sealed struct {
	vault Vault
	keys  *SealingKeys
	last  []byte // what was loaded or stored last
}

// vaultTime bounds one call of a vault.
const vaultTime = 5 * time.Second

// document is what is sealed.
type document struct {
	saved
	Pairs []sealedPair `json:"pairs"`
}

type sealedPair struct {
	ID          string `json:"id"`
	Certificate []byte `json:"certificate"` // DER
	Key         []byte `json:"key"`         // PKCS #8
}

func (s *sealed) where() string { return "the store" }
func (s *sealed) close() error  { return nil }

func (s *sealed) forget(string) error { return nil } // replace has left it out

func (s *sealed) read() (*saved, map[string]*pair, error) {
	ctx, cancel := context.WithTimeout(context.Background(), vaultTime)
	defer cancel()
	raw, err := s.vault.Load(ctx)
	if err != nil || raw == nil {
		return nil, nil, err
	}
	fail := func(err error, remedy string) (*saved, map[string]*pair, error) {
		return nil, nil, &assay.Error{Kind: assay.Denied, Op: "open the authority in the store", Err: err, Remedy: remedy}
	}
	plain, err := s.keys.open(raw)
	if err != nil {
		return fail(err, "give this control the sealing key of the others on this store")
	}
	var d document
	if err := json.Unmarshal(plain, &d); err != nil {
		return fail(err, "restore the store from its backup")
	}
	pairs := map[string]*pair{}
	for _, sp := range d.Pairs {
		p := &pair{id: sp.ID}
		if p.cert, err = x509.ParseCertificate(sp.Certificate); err != nil {
			return fail(fmt.Errorf("%s: %w", sp.ID, err), "")
		}
		key, err := x509.ParsePKCS8PrivateKey(sp.Key)
		if err != nil {
			return fail(fmt.Errorf("%s: %w", sp.ID, err), "")
		}
		ec, ok := key.(*ecdsa.PrivateKey)
		if !ok || !ec.PublicKey.Equal(p.cert.PublicKey) {
			return fail(fmt.Errorf("%s: the key is not that of the certificate", sp.ID), "")
		}
		p.key = ec
		pairs[p.id] = p
	}
	for _, id := range d.State.ids() {
		if pairs[id] == nil {
			return fail(fmt.Errorf("%s is missing", id), "")
		}
	}
	s.last = raw
	return &d.saved, pairs, nil
}

func (s *sealed) replace(what saved, pairs, _ map[string]*pair) (bool, error) {
	d := document{saved: what}
	for _, id := range slices.Sorted(maps.Keys(pairs)) {
		der, err := x509.MarshalPKCS8PrivateKey(pairs[id].key)
		if err != nil {
			return false, err
		}
		d.Pairs = append(d.Pairs, sealedPair{id, pairs[id].cert.Raw, der})
	}
	plain, err := json.Marshal(d)
	if err != nil {
		return false, err
	}
	next, err := s.keys.seal(plain)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), vaultTime)
	defer cancel()
	swapped, err := s.vault.Swap(ctx, s.last, next)
	if err == nil && swapped {
		s.last = next
	}
	return swapped, err
}

// changed reports whether somebody else has replaced the document.
func (s *sealed) changed() (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), vaultTime)
	defer cancel()
	raw, err := s.vault.Load(ctx)
	return err == nil && !bytes.Equal(raw, s.last), err
}
