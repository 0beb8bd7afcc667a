package attacks

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev/api"
	"assay.dev/test/lab"
	"google.golang.org/protobuf/encoding/protodelim"
)

// TestBoot attacks a host whose agent starts while control is dead: all that it has
// is what is on its disk.
func TestBoot(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	for _, attack := range []struct {
		name string
		run  func(t *testing.T, a *arena)
	}{
		{"from the snapshot on disk", bootFromDisk},
		{"without a snapshot", bootWithout},
		{"the snapshot altered: an endpoint outside the mesh", bootAltered},
		{"the snapshot altered: another workload's address", bootStolen},
	} {
		t.Run(attack.name, func(t *testing.T) { attack.run(t, newArena(t, lab.NewRoles(t))) })
	}
}

// snapshotFile is where the agent keeps it, as this process sees it.
func (a *arena) snapshotFile() string {
	return a.Path(filepath.Join(a.Mesh.Data, "agent", "agent", "snapshot"))
}

// reboot ends control and agent, changes the snapshot (nil takes it away), and starts
// the agent alone.
func (a *arena) reboot(t *testing.T, change func(d *api.Delta)) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, "the snapshot with the service is on disk", func() error {
		d, err := a.editSnapshot(nil)
		if err != nil {
			return err
		}
		for _, r := range d.GetUpsert() {
			if s := r.GetService(); s.GetName() == a.server.Name && len(s.GetEndpoints()) > 0 && s.GetEndpoints()[0].GetTargets()[0] != 0 {
				return nil
			}
		}
		return errors.New("it is not")
	})
	a.Mesh.Agent.Kill()
	a.Mesh.Control.Kill()
	if change == nil {
		if err := os.Remove(a.snapshotFile()); err != nil {
			t.Fatal(err)
		}
	} else if _, err := a.editSnapshot(change); err != nil {
		t.Fatal(err)
	}
	a.Mesh.StartAgent(t)
}

// editSnapshot reads the snapshot and, if it is to be changed, writes it again.
func (a *arena) editSnapshot(change func(d *api.Delta)) (*api.Delta, error) {
	text, err := os.ReadFile(a.snapshotFile())
	if err != nil {
		return nil, err
	}
	var delta *api.Delta
	var out bytes.Buffer
	for r := bufio.NewReader(bytes.NewReader(text)); ; {
		var u api.ControlUpdate
		err := protodelim.UnmarshalFrom(r, &u)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if d := u.GetDelta(); d != nil {
			if delta = d; change != nil {
				change(d)
			}
		}
		if _, err := protodelim.MarshalTo(&out, &u); err != nil {
			return nil, err
		}
	}
	if delta == nil {
		return nil, errors.New("the snapshot has no delta")
	}
	if change == nil {
		return delta, nil
	}
	return delta, os.WriteFile(a.snapshotFile(), out.Bytes(), 0o600)
}

// recount starts control again, so that the proxies' counters can be read.
func (a *arena) recount(t *testing.T, by *lab.Workload, reasons ...string) {
	t.Helper()
	a.Mesh.StartControl(t)
	a.mustBeCounted(t, by, reasons...)
	a.mustRecover(t)
}

// bootFromDisk: what runs goes on, and a proxy that has to be started anew gets no
// certificate: it refuses.
func bootFromDisk(t *testing.T, a *arena) {
	a.reboot(t, func(*api.Delta) {})
	for range 3 {
		if _, end := a.attempt(); end != "answered" {
			t.Errorf("with control dead since boot: %s", end)
		}
	}
	a.capture.ExpectNone(t)
	a.served.Store(0)
	old := a.Mesh.Proxy(a.server)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 30*time.Second, "another proxy", func() error {
		if now := a.Mesh.Proxy(a.server); now == 0 || now == old {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	a.mustRefuse(t)
	a.recount(t, a.client, "timeout", "disconnected")
}

// bootWithout: workloads that run keep what they know; a new one has nobody to talk
// to, and says nothing.
func bootWithout(t *testing.T, a *arena) {
	a.reboot(t, nil)
	for range 3 {
		if _, end := a.attempt(); end != "answered" {
			t.Errorf("with control dead since boot and nothing on disk: %s", end)
		}
	}
	late, err := a.Mesh.StartRun(t, "late", lab.Spec{})
	if err != nil {
		t.Fatalf("a new workload starts without control: %v", err)
	}
	a.served.Store(0)
	for range 3 {
		if sent, end := send(late.Space, netip.AddrPortFrom(a.server.IPv4, port)); end == "answered" || end == "EOF" {
			t.Errorf("a workload without a certificate: %s (%d bytes sent)", end, sent)
		}
	}
	a.nothingPassed(t)
	a.Mesh.StartControl(t)
	a.mustBeCounted(t, late, "unknown-mesh-address", "no-certificate")
	a.mustRecover(t)
}

// lure is a plain server that somebody wants the client to be sent to.
func (a *arena) lure(t *testing.T) (at *lab.Node, got *atomic.Int64) {
	at, got = a.Node(t, "lure"), new(atomic.Int64)
	at.Serve(t, port, func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		got.Add(n)
	})
	return at, got
}

// bootAltered: nobody is meshed, says the disk, and the service's endpoint is where a
// plain server is.
func bootAltered(t *testing.T, a *arena) {
	lure, got := a.lure(t)
	a.reboot(t, func(d *api.Delta) {
		kept := d.Upsert[:0]
		for _, r := range d.Upsert {
			if r.GetWorkload() != nil {
				continue
			}
			if s := r.GetService(); s.GetName() == a.server.Name {
				for _, e := range s.Endpoints {
					e.Addrs = [][]byte{lure.IPv4.AsSlice()}
				}
			}
			kept = append(kept, r)
		}
		d.Upsert = kept
	})
	a.awaitAltered(t, "handshake")
	// It may have seen the beginning of a handshake, never the marker. And the server
	// itself, which is in no table any more, is not dialled at all.
	t.Logf("%d bytes reached the plain server", got.Load())
	service := a.to
	a.to = netip.AddrPortFrom(a.server.IPv4, port)
	a.mustRefuse(t)
	a.to = service
	a.recount(t, a.client, "unknown-mesh-address")
}

// bootStolen: the service's endpoint is at another workload's address.
func bootStolen(t *testing.T, a *arena) {
	thief := a.Workload(t, "thief", lab.Spec{Ports: []int{port}})
	var got atomic.Int64
	thief.Serve(t, port, func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		got.Add(n)
	})
	a.AwaitService(t, a.client, thief.Name, port)
	a.before = takeTallies(t, a.Mesh)
	a.reboot(t, func(d *api.Delta) {
		for _, r := range d.Upsert {
			if s := r.GetService(); s.GetName() == a.server.Name {
				for _, e := range s.Endpoints {
					e.Addrs = [][]byte{thief.IPv4.AsSlice(), thief.IPv6.AsSlice()}
				}
			}
		}
	})
	a.awaitAltered(t, "identity-mismatch")
	if n := got.Load(); n > 0 {
		t.Errorf("%d bytes reached the thief", n)
	}
	a.recount(t, a.client, "identity-mismatch")
}

// awaitAltered attempts until the client's proxy has been told the altered snapshot,
// which it shows by a refusal for that reason.
func (a *arena) awaitAltered(t *testing.T, reason string) {
	t.Helper()
	lab.Eventually(t, 20*time.Second, "the altered snapshot is in use", func() error {
		if _, end := a.attempt(); end == "answered" {
			return errors.New("the honest one is")
		}
		if logs := a.Mesh.ProxyLogs(t, a.client); !strings.Contains(logs, reason) {
			return fmt.Errorf("no %s in the log of the client's proxy: %s", reason, logs)
		}
		return nil
	})
	a.served.Store(0) // honest attempts of before
	a.mustRefuse(t)
}
