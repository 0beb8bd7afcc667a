package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/identity"
	"assay.dev/store"
)

// Control serves from memory, so a store has one control at a time. On a server others
// may be started and wait; the next one takes over when the holder has shown no life
// for takeover, by the clock of the one that waits.
const (
	takeover  = 15 * time.Second
	metaMesh  = "control/mesh"
	ownIDFile = "control.id"
)

// claim waits until the store is this control's. It is the first that Open does with
// the store: what another one writes before that is loaded.
func (c *Control) claim(ctx context.Context) error {
	if c.cfg.Authority == nil {
		// An authority of this folder's own would be another one.
		switch _, err := c.store.GetMeta(ctx, metaAuthority); {
		case err == nil:
			return &assay.Error{Kind: assay.Conflict, Op: "open store " + c.store.Name(), Err: errors.New("it has the authority too, sealed"),
				Remedy: "give this control the sealing key of the others: --authority-key FILE"}
		case assay.KindOf(err) != assay.NotFound:
			return err
		}
	}
	if !c.store.Shared() {
		return nil // the file has a lock of its own
	}
	id, err := ownID(c.cfg.Data)
	if err != nil {
		return err
	}
	return c.store.Claim(ctx, id, c.cfg.takeover, func(holder string) {
		c.log.Info("another control holds the store; waiting until it ends", "holder", holder, "store", c.store.Name())
	})
}

// ownID names the control of a data folder, whose lock this process has: restarted it
// is the same one.
func ownID(dir string) (string, error) {
	path := filepath.Join(dir, ownIDFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		var random [8]byte
		rand.Read(random[:])
		b = []byte(hex.EncodeToString(random[:]) + "\n")
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return "", &assay.Error{Op: "name this control", Err: err, Remedy: "the data folder must be readable and writable"}
	}
	return strings.TrimSpace(string(b)), nil
}

// showLife keeps the store until ctx ends. With the store away that fails, and serving
// goes on; when another one has taken it over meanwhile, this one ends.
func (c *Control) showLife(ctx context.Context) error {
	t := time.NewTicker(c.cfg.takeover / 5)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := c.sameMesh(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("the store was not told this mesh's roots", "err", err)
		}
		if !c.store.Shared() {
			continue
		}
		renew, cancel := context.WithTimeout(ctx, c.cfg.takeover/2)
		err := c.store.Renew(renew)
		cancel()
		if errors.Is(err, store.ErrTaken) {
			c.taken.Store(true)
			return err
		}
		if err != nil && ctx.Err() == nil {
			c.log.Warn("the store does not hear that this control lives", "err", err)
		}
	}
}

// giveUp lets the next one have the store at once. If that fails it waits a little.
func (c *Control) giveUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if err := c.store.Release(ctx); err != nil && !errors.Is(err, store.ErrTaken) && assay.KindOf(err) != assay.Unavailable {
		return err
	}
	return nil
}

// mesh is whose a store is.
type mesh struct {
	TrustDomain string   `json:"trustDomain"`
	Roots       []string `json:"roots"` // SHA-256 of the certificates
}

// has reports whether one of the roots is the mesh's.
func (m *mesh) has(roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool { return slices.Contains(m.Roots, root) })
}

func rootsOf(a *identity.Authority) (list []string) {
	for _, der := range a.Bundle().Roots {
		sum := sha256.Sum256(der)
		list = append(list, hex.EncodeToString(sum[:]))
	}
	return list
}

// storedMesh returns whose the store is, and that as it is stored; nil: nobody's yet.
func (c *Control) storedMesh(ctx context.Context) (*mesh, []byte, error) {
	raw, err := c.store.GetMeta(ctx, metaMesh)
	if assay.KindOf(err) == assay.NotFound {
		return nil, nil, nil
	}
	var m mesh
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	return &m, raw, err
}

func (c *Control) otherAuthority(whose *mesh, cause string) error {
	return &assay.Error{Kind: assay.Conflict, Op: "open store " + c.store.Name(), Err: errors.New("it is that of " + whose.TrustDomain + ", " + cause),
		Remedy: "put that mesh's folder ca there, from the control that has it or from its backup, or name a store of this mesh's own"}
}

// sameMesh refuses a store that is another authority's: its hosts and workloads could
// not be told from this one's, and would trust nothing that this one signs. It keeps
// the store's idea of the roots up to date.
func (c *Control) sameMesh(ctx context.Context) error {
	own := mesh{TrustDomain: c.authority.TrustDomain(), Roots: rootsOf(c.authority)}
	encoded, err := json.Marshal(own)
	if err != nil {
		return err
	}
	if string(encoded) == c.told {
		return nil
	}
	was, raw, err := c.storedMesh(ctx)
	if err != nil {
		return err
	}
	if was != nil && !was.has(own.Roots) {
		return c.otherAuthority(was, "with another authority than the one in "+c.cfg.Data)
	}
	if string(raw) != string(encoded) {
		if err := c.store.PutMeta(ctx, metaMesh, encoded); err != nil {
			return err
		}
	}
	c.told = string(encoded)
	return nil
}
