package main

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"assay.dev"
)

// resolver asks the proxy from inside the workload, as a C library does.
func (m *workload) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
		err = m.ns.Do(func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, "127.0.0.153:53")
			return err
		})
		return c, err
	}}
}

// TestNames resolves a service's name and dials what comes out of it.
func TestNames(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	w.service("echo", 7, assay.Opaque, server.serve(0, echo), server)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r := client.resolver()
	for _, name := range []string{"echo.", "echo.bank.", "echo.bank.svc.mesh.test."} {
		got, err := r.LookupHost(ctx, name)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, []string{"10.182.0.1", "fd5a:5a59:1::1"}) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		for _, a := range got {
			if said := exchange(t, client.mustDial(netip.AddrPortFrom(netip.MustParseAddr(a), 7)), "hello"); said != "hello" {
				t.Errorf("%s: %q", a, said)
			}
		}
	}
	if _, err := r.LookupHost(ctx, "elsewhere.example."); err == nil {
		t.Error("a name that nobody can be asked about was found")
	}
	// Names go on when the agent is gone.
	client.mu.Lock()
	conn := client.conn
	client.mu.Unlock()
	conn.Close()
	if got, err := r.LookupHost(ctx, "echo."); err != nil || len(got) != 2 {
		t.Errorf("without an agent: %v, %v", got, err)
	}
}
