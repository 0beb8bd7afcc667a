package control

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
	"google.golang.org/grpc/credentials"
)

// A host's certificate lets it be endpoints of the services that its token covers, and
// of no others, whatever labels it writes on its workloads.
func TestLabelsMakeNoService(t *testing.T) {
	r := start(t, withIntent)
	o := r.operator(t)
	la := syncHost(t, localHosts(t, r), nil)
	if _, err := apply(t, o, &api.ApplyRequest{Files: files("a.yaml", paymentsYAML)}); err != nil {
		t.Fatal(err)
	}
	labelled := func(a *agent, id, service string) {
		w := a.workload(id, "bank", service, 1, 8080)
		w.Labels = map[string]string{"app": "payments"}
		a.up(w)
		a.waitAccepted(id)
	}
	h := r.join(t, "node", "bank/ledger")
	ha := syncHost(t, h.hosts, nil)
	labelled(ha, "led-1", "ledger")
	labelled(la, "pay-1", "payments") // after the other, so what is seen is with both
	eventually(t, "the right endpoint is there", func() bool {
		return strings.Contains(fmt.Sprint(la.get("service/bank/payments")), "pay-1")
	})
	if svc := la.get("service/bank/payments").GetService(); len(svc.Endpoints) != 1 {
		t.Errorf("a host that covers bank/ledger is an endpoint of bank/payments: %v", svc)
	}
	// One that covers it is.
	second := r.join(t, "node2", "bank/*")
	sa := syncHost(t, second.hosts, nil)
	labelled(sa, "led-2", "ledger")
	eventually(t, "a host that covers it is an endpoint", func() bool {
		return strings.Contains(fmt.Sprint(la.get("service/bank/payments")), "led-2")
	})
}

// A host without prefixes has no addresses.
func TestNoPrefixNoAddress(t *testing.T) {
	r := start(t, nil)
	h := &host{Host: store.Host{Host: assay.Host{ID: "bare", Covers: []string{"*/*"}}}}
	w := &assay.Workload{ID: "w", Namespace: "a", Name: "b", Host: "bare", Identity: assay.Identity{TrustDomain: r.TrustDomain(), Namespace: "a", Account: "b"},
		Addrs: []netip.Addr{netip.MustParseAddr("10.181.0.9")}}
	if _, err := r.model.admit(h, w, nil); assay.KindOf(err) != assay.Denied {
		t.Errorf("it claims %v: %v", w.Addrs, err)
	}
}

// Whoever has no certificate can neither fill the audit trail nor have anything
// signed, and what it sends beside a join is not even read.
func TestNobodyCostsLittle(t *testing.T) {
	r := start(t, nil)
	token := r.token(t, "bank/*")
	conn := r.dial(t, api.JoinTLS(token, time.Now))
	forged := token
	forged.Secret[0] ^= 1
	request := &api.JoinRequest{Token: forged.String(), Csr: csr(t, newKey(t)), HostName: "nobody"}
	before := r.authority.State()
	for range recordedNobodies * 2 {
		if _, err := api.NewHostsClient(conn).Join(t.Context(), request); assay.KindOf(api.StatusError("join", err)) != assay.NotFound {
			t.Fatal(err)
		}
	}
	if after := r.authority.State(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("something was signed for a forged token: %v, then %v", before, after)
	}
	large := &api.ApplyRequest{Files: []*api.File{{Name: "a.yaml", Yaml: make([]byte, 8<<20)}}}
	for range 20 {
		if _, err := api.NewOperatorClient(conn).Apply(t.Context(), large); assay.KindOf(api.StatusError("apply", err)) != assay.Denied {
			t.Fatal(err)
		}
	}
	calls := 0
	for _, a := range documents[store.Audit](t, r.operator(t), "audit") {
		if a.Role == string(anonymous) {
			calls++
		}
	}
	if calls < recordedNobodies/2 || calls > recordedNobodies+60 {
		t.Errorf("%d calls of nobody are on record", calls)
	}
	if n := r.joining.Load(); n != 0 {
		eventually(t, "no join is under way", func() bool { return r.joining.Load() == 0 })
	}
	// The true token is as good as before.
	if _, err := r.tryJoin(t, token, newKey(t), "node"); err != nil {
		t.Error(err)
	}
	// An acknowledgement for a workload that cannot be takes no room.
	la := syncHost(t, localHosts(t, r), nil)
	la.ack(strings.Repeat("x", 1<<20), 1)
	la.up(la.workload("w", "bank", "web", 1, 80))
	la.waitAccepted("w")
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	for s := range r.model.sessions {
		if len(s.early) != 0 {
			t.Errorf("%d acknowledgements of nobody wait", len(s.early))
		}
	}
}

// Connections without a certificate are few from one address, and end; hosts from
// another address come in meanwhile, and those who have a certificate stay.
func TestStrangersOnTheListener(t *testing.T) {
	r := start(t, nil)
	h := r.join(t, "node", "bank/*")
	ha := syncHost(t, h.hosts, nil)
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range 4 * maxStrangersFrom {
		c, err := net.Dial("tcp", r.remote.String())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	closed := 0
	for _, c := range slices.Backward(held) { // the last came too late
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			closed++
		}
		if closed >= 3*maxStrangersFrom {
			break
		}
	}
	if closed < 3*maxStrangersFrom {
		t.Errorf("%d of %d connections were closed", closed, len(held))
	}
	// From another address.
	other := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := tls.DialWithDialer(other, "tcp", r.remote.String(), api.JoinTLS(r.token(t, "bank/*"), time.Now))
	if err != nil {
		t.Errorf("somebody else is kept out: %v", err)
	} else {
		c.Close()
	}
	ha.up(ha.workload("w", "bank", "web", 1, 80))
	ha.waitAccepted("w")

	// Each ends, and none is counted then.
	s := newStrangers(credentials.NewTLS(r.serverTLS()))
	s.life = 20 * time.Millisecond
	near, far := net.Pipe()
	defer far.Close()
	client := tls.Client(far, api.JoinTLS(r.token(t, "bank/*"), time.Now))
	var g sync.WaitGroup
	g.Go(func() { client.Handshake(); io.Copy(io.Discard, client) })
	conn, _, err := s.ServerHandshake(near)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	g.Wait() // the copy ends with the connection
	if s.mu.Lock(); s.all != 0 || len(s.from) != 0 {
		t.Errorf("%d are counted: %v", s.all, s.from)
	}
	s.mu.Unlock()
}
