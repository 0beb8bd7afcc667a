package control

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"assay.dev"
	"assay.dev/identity"
	"assay.dev/store"
)

// metaAuthority is the authority, sealed, where it is in the store.
const metaAuthority = "control/authority"

// vault keeps the sealed authority in the store.
type vault struct{ db *store.DB }

func (v vault) Load(ctx context.Context) ([]byte, error) {
	raw, err := v.db.GetMeta(ctx, metaAuthority)
	if assay.KindOf(err) == assay.NotFound {
		return nil, nil
	}
	return raw, err
}

func (v vault) Swap(ctx context.Context, old, next []byte) (bool, error) {
	return v.db.CompareAndSetMeta(ctx, metaAuthority, old, next)
}

// openAuthority opens the authority in the data folder or, under a sealing key, in the store.
func (c *Control) openAuthority(ctx context.Context) (err error) {
	cfg := identity.Config{Dir: filepath.Join(c.cfg.Data, "ca"), TrustDomain: c.cfg.TrustDomain, Policy: c.cfg.Certificates, LeafLife: c.cfg.LeafLife, Now: c.cfg.Now}
	_, missing := os.Lstat(filepath.Join(cfg.Dir, "state.json"))
	inFolder, inStore := !errors.Is(missing, os.ErrNotExist), false
	// Before the authority is looked for: who makes a mesh stores the authority first.
	whose, _, err := c.storedMesh(ctx)
	if err != nil {
		return err
	}
	if c.cfg.Authority != nil {
		v := vault{c.store}
		sealed, err := v.Load(ctx)
		if err != nil {
			return err
		}
		cfg.Vault, cfg.Keys, inStore = v, c.cfg.Authority, sealed != nil
	}
	if whose != nil && !inStore {
		if err := c.ownerOf(whose, cfg, inFolder); err != nil {
			return err
		}
	}
	if cfg.TrustDomain == "" && !inFolder && !inStore {
		cfg.TrustDomain = "assay.local"
	}
	if c.authority, err = identity.Open(cfg); err != nil || cfg.Vault == nil || !inFolder {
		return err
	}
	if inStore {
		c.log.Warn("the authority is the one in the store; the folder's is not used", "folder", cfg.Dir)
		return nil
	}
	// Kept, for whoever wants it back, where no control looks.
	moved := cfg.Dir + ".moved"
	if err := os.Rename(cfg.Dir, moved); err != nil {
		return &assay.Error{Op: "put the authority into the store", Err: err, Remedy: "it is there now; move " + cfg.Dir + " away by hand"}
	}
	c.log.Info("the authority is in the store now, sealed; remove the folder that it was in when the sealing key has a backup", "folder", moved)
	return nil
}

// ownerOf refuses to make, or put into the store, another authority than that of the mesh whose
// the store is. Which one that is only the folder knows that has it.
func (c *Control) ownerOf(whose *mesh, cfg identity.Config, inFolder bool) error {
	if !inFolder {
		return c.otherAuthority(whose, "and there is no authority in "+cfg.Dir+" nor in the store")
	}
	cfg.Vault, cfg.Keys = nil, nil
	folder, err := identity.Open(cfg)
	if err != nil {
		return err
	}
	if roots := rootsOf(folder); !whose.has(roots) {
		err = c.otherAuthority(whose, "with another authority than the one in "+cfg.Dir)
	}
	return errors.Join(err, folder.Close())
}

// beOneOfSeveral lets others in: from here on the store is not this control's alone.
func (c *Control) beOneOfSeveral(ctx context.Context) error {
	if err := c.store.Release(ctx); err != nil {
		return err
	}
	c.several = newSeveral(c.cfg.Advertise)
	c.store.Follow(c.several.id)
	list, err := c.store.ListReplicas(ctx)
	if err != nil {
		return err
	}
	c.several.note(list, nil, c.several.beaten, false, c.cfg.takeover, map[string]bool{})
	return c.store.Beat(ctx, c.several.address)
}
