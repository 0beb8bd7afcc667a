package agent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
)

// adopt takes over what the last agent left, and removes what nobody owns any more.
// Afterwards host, state folder and this agent agree.
func (a *Agent) adopt() {
	list, broken, err := a.store.records()
	if err != nil {
		a.log.Error("the records of workloads cannot be read", "err", err)
	}
	for _, name := range broken {
		a.log.Error("a record cannot be read; its workload is removed", "file", name)
		os.Remove(a.store.path("workloads", name))
	}
	kept := map[string]bool{}
	for _, rec := range list {
		if err := a.adoptOne(rec); err != nil {
			a.log.Info("workload of the last agent is removed", "workload", rec.Workload.ID, "reason", err)
			a.sweep(rec)
			continue
		}
		kept[rec.Port] = true
		kept[rec.Workload.ID] = true
		a.log.Info("workload adopted", "workload", rec.Workload.ID)
	}
	a.sweepHost(kept)
}

// adoptOne continues a workload, or says why there is nothing to continue.
func (a *Agent) adoptOne(rec record) error {
	if rec.Boot != a.boot {
		return errors.New("the machine was started since")
	}
	if rec.Given != nil {
		return a.adoptPod(rec)
	}
	owner, err := rec.Owner.open()
	if err != nil {
		return fmt.Errorf("its owner: %w", err)
	}
	defer owner.Close()
	command, err := rec.Command.open()
	if err != nil && rec.Command.PID != 0 {
		return fmt.Errorf("its command: %w", err)
	}
	proxies := a.adoptable(rec)
	ns, err := namespaceOf(rec.NetNS, append(proxies.processes(), command)...)
	if err != nil {
		for _, p := range append(proxies.processes(), command) {
			if p != nil {
				p.Close()
			}
		}
		return err
	}
	w := a.continued(rec, ns, proxies)
	if host := a.hostNetwork(); host != nil {
		if err := host.Allow(rec.Port, rec.Workload.Addrs); err != nil {
			a.log.Error("port filter", "workload", w.id, "err", err)
		}
	}
	w.start()
	// All owners are watched by descriptors of their own.
	if file, err := owner.File(); err == nil {
		if p, err := attest.FromPidfd(file); err == nil {
			w.own(p)
		}
	}
	if command != nil {
		if err := w.started(command); err != nil {
			w.end(err)
		}
	}
	return nil
}

// continued is a workload of the last agent, before it is started again.
func (a *Agent) continued(rec record, ns *netns.Namespace, p proxies) *workload {
	a.mu.Lock()
	for _, x := range rec.Workload.Addrs {
		a.inUse[x] = true
	}
	a.mu.Unlock()
	w := a.newWorkload(rec, ns)
	w.adopted = true
	w.current, w.next, w.older = p.current, p.next, p.older
	for _, proc := range p.processes() {
		var err error
		if w.listeners, err = listenersOf(proc, &rec); err == nil {
			break
		}
		a.log.Warn("listeners come when the proxy does", "workload", w.id, "err", err)
	}
	if p.current != nil && p.current.domain != rec.Workload.Identity.TrustDomain {
		w.wantUpgrade()
	}
	if !rec.Workload.MeshedSince.IsZero() && a.cfg.Own == nil {
		w.accepts.set() // its listeners never closed
	}
	return w
}

// proxies are those of one workload.
type proxies struct {
	current, next *generation
	older         []*generation
}

// processes holds the ones that are there, the current one first.
func (p proxies) processes() (list []*attest.Process) {
	for _, g := range append([]*generation{p.current, p.next}, p.older...) {
		if g != nil {
			list = append(list, g.proc)
		}
	}
	return list
}

// adoptable returns the recorded proxies that still are that: same process, same
// executable, same namespace. Anything else with its number is somebody else.
func (a *Agent) adoptable(rec record) (p proxies) {
	open := func(ref processRef, digest assay.Digest, domain string) *generation {
		proc, err := ref.open()
		if err != nil {
			return nil
		}
		exe, facts, err := a.digester.Executable(proc)
		if err != nil || exe.Digest != digest || facts.NetNS != rec.NetNS {
			proc.Close()
			return nil
		}
		return newGeneration(proc, digest, cmp.Or(domain, rec.Workload.Identity.TrustDomain))
	}
	p.current = open(rec.Proxy, rec.ProxyExe, rec.ProxyDomain)
	if n := rec.Next; n != nil {
		if p.next = open(n.Process, n.Exe, n.Domain); p.next != nil {
			p.next.successor = true
		}
	}
	if p.current == nil { // it is waited for no more
		p.current, p.next = p.next, nil
	}
	for _, r := range rec.Older {
		if g := open(r.Process, r.Exe, r.Domain); g != nil {
			g.until = r.Until
			p.older = append(p.older, g)
		}
	}
	return p
}

// namespaceOf finds a workload's namespace through a process that is in it.
func namespaceOf(inode uint64, list ...*attest.Process) (*netns.Namespace, error) {
	for _, p := range list {
		if p == nil {
			continue
		}
		ns, err := netns.OfProcess(p.PID())
		if err != nil {
			continue
		}
		if ns.Inode() == inode && p.Alive() {
			return ns, nil
		}
		ns.Close()
	}
	return nil, errors.New("neither its proxy nor its command is alive")
}

// sweep removes a workload that nobody continues: processes, link, files.
func (a *Agent) sweep(rec record) {
	var failed error
	if rec.Given != nil && rec.Boot == a.boot {
		failed = a.sweepPod(rec)
	} else if rec.Boot == a.boot {
		a.endAll(rec)
	}
	if host := a.hostNetwork(); host != nil && rec.Given == nil {
		failed = host.Detach(rec.Port)
	}
	failed = errors.Join(failed, os.RemoveAll(a.runDir(rec.Workload.ID)), a.store.forget(rec.Workload.ID))
	if failed != nil {
		a.log.Error("something of a swept workload is left", "workload", rec.Workload.ID, "err", failed)
	}
}

// endAll ends every process in a workload's namespace. An inode may belong to another
// namespace by now, so it must have the workload's address too.
func (a *Agent) endAll(rec record) {
	list := inNamespace(rec.NetNS)
	if len(list) == 0 || len(rec.Workload.Addrs) == 0 {
		return
	}
	ns, err := namespaceOf(rec.NetNS, list...)
	if err == nil {
		defer ns.Close()
		if !ns.HasAddress(rec.Workload.Addrs[0]) {
			err = errors.New("the namespace is another one's")
		}
	}
	for _, p := range list {
		if err == nil {
			p.Signal(syscall.SIGKILL)
			waitGone(p)
		}
		p.Close()
	}
}

// waitGone waits until a killed process has ended, so that its namespace has too.
func waitGone(p *attest.Process) {
	for deadline := time.Now().Add(2 * time.Second); p.Alive() && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
	}
}

// sweepHost removes ports and files that no kept workload has.
func (a *Agent) sweepHost(kept map[string]bool) {
	if host := a.hostNetwork(); host != nil {
		ports, err := host.Ports()
		if err != nil {
			a.log.Error("the host's ports cannot be listed", "err", err)
		}
		for _, port := range ports {
			if !kept[port] {
				if err := host.Detach(port); err != nil {
					a.log.Error("a leftover link stays", "link", port, "err", err)
				}
			}
		}
	}
	for _, id := range a.cfg.Outside.groups() {
		if !kept[id] {
			if err := a.cfg.Outside.removeGroup(id); err != nil {
				a.log.Error("a leftover control group stays", "workload", id, "err", err)
			}
		}
	}
	for _, dir := range []string{a.store.path("workloads"), filepath.Join(a.cfg.RuntimeDir, "workloads")} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			id := strings.TrimSuffix(strings.TrimSuffix(e.Name(), ".json"), ".log")
			if !kept[id] {
				os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
	}
}
