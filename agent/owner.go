package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"assay.dev"
	"assay.dev/agent/attest"
)

// Whose processes a workload is, and what they run.

// watchOwners ends the workload when one of the processes whose workload it is has
// ended.
func (w *workload) watchOwners(ctx context.Context) {
	var g sync.WaitGroup
	defer g.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-w.owned:
			g.Go(func() { w.watchOwner(ctx, p) })
		}
	}
}

func (w *workload) watchOwner(ctx context.Context, p *attest.Process) {
	defer p.Close()
	if err := p.Wait(ctx); err == nil {
		w.end(fmt.Errorf("process %d has ended", p.PID()))
	}
}

// own hands a process over to watchOwners.
func (w *workload) own(p *attest.Process) {
	select {
	case w.owned <- p:
	case <-w.done:
		p.Close()
	}
}

// started takes in the command's process: it is attested, and its end is the
// workload's.
func (w *workload) started(p *attest.Process) error {
	facts, err := p.Facts()
	if err != nil {
		return err
	}
	if facts.NetNS != w.ns.Inode() {
		p.Close()
		return &assay.Error{Kind: assay.Denied, Op: "run " + w.id, Err: errors.New("the command does not run in the workload's network namespace")}
	}
	file, err := p.File()
	if err != nil {
		return err
	}
	watched, err := attest.FromPidfd(file)
	if err != nil {
		return err
	}
	w.mu.Lock()
	if w.command != nil {
		w.mu.Unlock()
		watched.Close()
		p.Close()
		return nil
	}
	w.command = p
	w.rec.Command = refOf(p)
	w.mu.Unlock()
	w.own(watched)
	w.checkArtifacts()
	w.look()
	return w.save()
}

// checkArtifacts attests again when the command executes another file than before.
// It reports whether that was so.
func (w *workload) checkArtifacts() bool {
	w.mu.Lock()
	command, last, tree := w.command, w.exeID, w.rec.Workload.Artifacts
	w.mu.Unlock()
	if command == nil {
		return false
	}
	facts, err := command.Facts()
	if err != nil || facts.ExeID == last {
		return false
	}
	exe, facts, err := w.a.digester.Executable(command)
	if errors.Is(err, attest.ErrGone) {
		return false
	}
	if err != nil {
		w.log.Error("the executable cannot be attested", "err", err)
		return false
	}
	set := assay.ArtifactSet{exe}
	for _, a := range tree {
		if a.Kind == assay.Tree {
			set[0].Unproven = "" // the tree proves what is interpreted
			set = append(set, a)
		}
	}
	w.mu.Lock()
	w.exeID = facts.ExeID
	w.mu.Unlock()
	if w.setArtifacts(set) {
		w.log.Info("attested", "exe", exe.Name, "digest", exe.Digest, "unproven", exe.Unproven)
	}
	return true
}
