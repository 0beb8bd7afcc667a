package control

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestEveryMethodHasARule compares the access table with the services: a method
// without a rule is denied, and a rule without a method is a mistake.
func TestEveryMethodHasARule(t *testing.T) {
	want := map[string]bool{}
	for _, desc := range []grpc.ServiceDesc{api.Hosts_ServiceDesc, api.Operator_ServiceDesc, api.Replicas_ServiceDesc} {
		for _, m := range desc.Methods {
			want["/"+desc.ServiceName+"/"+m.MethodName] = true
		}
		for _, s := range desc.Streams {
			want["/"+desc.ServiceName+"/"+s.StreamName] = true
		}
	}
	for method := range want {
		if len(access[method].roles) == 0 {
			t.Errorf("%s has no rule: say who may call it and whether it is recorded", method)
		}
	}
	for method := range access {
		if !want[method] {
			t.Errorf("%s is no method", method)
		}
	}
	// What changes something is recorded; hosts' facts and certificates have records
	// of their own.
	for method, r := range access {
		reads := strings.HasSuffix(method, "/List") || strings.HasSuffix(method, "/Check")
		if slices.Contains(r.roles, operator) && r.audited == reads {
			t.Errorf("%s: audited is %v", method, r.audited)
		}
		if slices.Contains(r.roles, viewer) && !reads {
			t.Errorf("%s: a viewer changes something", method)
		}
	}
}

// TestUnlistedMethodIsDenied calls a method that has no rule.
func TestUnlistedMethodIsDenied(t *testing.T) {
	r := start(t, nil)
	saved := access[api.Operator_List_FullMethodName]
	r.stop() // nobody reads the table any more
	delete(access, api.Operator_List_FullMethodName)
	defer func() { access[api.Operator_List_FullMethodName] = saved }()
	if _, _, err := r.admitCall(t.Context(), api.Operator_List_FullMethodName); assay.KindOf(err) != assay.Denied || !strings.Contains(err.Error(), "access table") {
		t.Errorf("got %v", err)
	}
}

// remoteOperator has a certificate signed and dials with it.
func (r *running) remoteOperator(t *testing.T, role, name string) api.OperatorClient {
	t.Helper()
	key := newKey(t)
	resp, err := r.operator(t).IssueOperator(t.Context(), &api.IssueOperatorRequest{Name: name, Role: role, Csr: csr(t, key), TtlSeconds: 3600})
	if err != nil {
		t.Fatal(err)
	}
	h := &remoteHost{bundle: resp.Bundle, cert: tls.Certificate{Certificate: resp.Chain, PrivateKey: key}}
	h.connect(t, r)
	return api.NewOperatorClient(h.conn)
}

func TestRoles(t *testing.T) {
	r := start(t, nil)
	h := r.join(t, "node", "*/*")
	callers := map[string]struct {
		operator api.OperatorClient
		hosts    api.HostsClient
	}{
		"operator": {r.remoteOperator(t, "operator", "ann"), nil},
		"viewer":   {r.remoteOperator(t, "viewer", "vic"), nil},
		"host":     {api.NewOperatorClient(h.conn), h.hosts},
	}
	conn := r.dial(t, api.JoinTLS(r.token(t, "*/*"), time.Now))
	callers["nobody"] = struct {
		operator api.OperatorClient
		hosts    api.HostsClient
	}{api.NewOperatorClient(conn), api.NewHostsClient(conn)}
	for who, c := range callers {
		may := func(what string, want bool, err error) {
			t.Helper()
			denied := assay.KindOf(api.StatusError(what, err)) == assay.Denied
			if err == nil && !want || want && denied || !want && !denied {
				t.Errorf("%s %s: %v", who, what, err)
			}
		}
		ctx := t.Context()
		_, err := c.operator.List(ctx, &api.ListRequest{Kind: "hosts"})
		may("list", who == "viewer" || who == "operator", err)
		_, err = c.operator.Check(ctx, &api.CheckRequest{})
		may("check", who == "viewer" || who == "operator", err)
		_, err = c.operator.CreateToken(ctx, &api.CreateTokenRequest{Covers: []string{"a/b"}, TtlSeconds: 60})
		may("create token", who == "operator", err)
		_, err = c.operator.Apply(ctx, &api.ApplyRequest{})
		may("apply", who == "operator", err)
		_, err = c.operator.Delete(ctx, &api.DeleteRequest{Kind: "host", Name: "nobody"})
		may("delete", who == "operator", err)
		_, err = c.operator.IssueOperator(ctx, &api.IssueOperatorRequest{Name: "x", Role: "operator", Csr: csr(t, newKey(t)), TtlSeconds: 60})
		may("issue operator", who == "operator", err)
		_, err = c.operator.Rotate(ctx, &api.RotateRequest{})
		may("rotate", who == "operator", err)
		if c.hosts == nil {
			continue
		}
		_, err = c.hosts.Renew(ctx, &api.RenewRequest{Csr: csr(t, newKey(t))})
		may("renew", who == "host", err)
		_, err = c.hosts.Issue(ctx, &api.IssueRequest{WorkloadId: "nobody"})
		may("issue", who == "host", err)
		stream, err := c.hosts.Sync(ctx)
		if err == nil {
			err = stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{}}})
		}
		if err == nil || errors.Is(err, io.EOF) { // it was refused already: Recv says why
			_, err = stream.Recv()
		}
		may("sync", who == "host", err)
	}
	// Every attempt to change something is on record, with who and what came of it.
	o := r.operator(t)
	lines := documents[store.Audit](t, o, "audit")
	seen := func(who, call, outcome string) bool {
		return slices.ContainsFunc(lines, func(a store.Audit) bool {
			return strings.Contains(a.Who, who) && a.Call == call && strings.Contains(a.Outcome, outcome) && !a.Time.IsZero()
		})
	}
	for _, want := range [][3]string{
		{"/assay/operator/ann", "CreateToken", "ok"}, {"/assay/viewer/vic", "CreateToken", "is a viewer; it takes an operator"},
		{"/assay/host/", "Rotate", "is a host"}, {"without a certificate", "Apply", "is an anonymous"},
		{"uid 0", "IssueOperator", "ok"}, {"token ", "Join", "ok"}, {"/assay/operator/ann", "Delete", "no such host"},
	} {
		if os.Geteuid() != 0 && want[0] == "uid 0" {
			continue
		}
		if !seen(want[0], want[1], want[2]) {
			t.Errorf("not on record: %v\n%s", want, show(lines))
		}
	}
	// And it survives a restart.
	r = r.restart(nil)
	if again := documents[store.Audit](t, r.operator(t), "audit"); len(again) < len(lines) {
		t.Errorf("%d lines before the restart, %d after", len(lines), len(again))
	}
}

func TestWrongCertificates(t *testing.T) {
	r := start(t, nil)
	h := r.join(t, "node", "*/*")
	a := syncHost(t, h.hosts, nil)
	a.up(a.workload("w1", "bank", "s", 1, 80))
	a.waitAccepted("w1")
	key := newKey(t)
	resp, err := h.hosts.Issue(t.Context(), &api.IssueRequest{WorkloadId: "w1", Csr: csr(t, key), Artifacts: api.FromArtifacts(artifacts("w1"))})
	if err != nil {
		t.Fatal(err)
	}
	other := start(t, nil)
	stranger := other.join(t, "node", "*/*")

	try := func(cert tls.Certificate) error {
		x := &remoteHost{bundle: h.bundle, cert: cert}
		x.connect(t, r)
		_, err := x.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
		return err
	}
	if err := try(h.cert); err != nil {
		t.Errorf("its own: %v", err)
	}
	if err := try(tls.Certificate{Certificate: resp.Chain, PrivateKey: key}); err == nil {
		t.Error("a workload's certificate opens the hosts' door")
	}
	if err := try(stranger.cert); err == nil {
		t.Error("another mesh's certificate opens the door")
	}
	selfMade := &x509.Certificate{SerialNumber: h.leaf(t).SerialNumber, URIs: h.leaf(t).URIs, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, Policies: []x509.OID{assay.InfrastructurePolicy}}
	der, err := x509.CreateCertificate(rand.Reader, selfMade, selfMade, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := try(tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}); err == nil {
		t.Error("a self-made certificate opens the door")
	}
	// The client knows control too: another mesh's is not taken for it.
	h.bundle = stranger.bundle
	h.connect(t, r)
	if _, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err == nil {
		t.Error("control's certificate was not checked")
	}
}

func (h *remoteHost) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(h.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestJoinTokens(t *testing.T) {
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	token := r.token(t, "bank/*")
	key := newKey(t)
	h, err := r.tryJoin(t, token, key, "node")
	if err != nil {
		t.Fatal(err)
	}
	// The answer was lost: the same key may ask again, and is the same host.
	again, err := r.tryJoin(t, token, key, "node")
	if err != nil || again.id != h.id {
		t.Errorf("repeated with the same key: %v", err)
	}
	if _, err := r.tryJoin(t, token, newKey(t), "thief"); assay.KindOf(api.StatusError("join", err)) != assay.Conflict {
		t.Errorf("used twice: %v", err)
	}
	forged := token
	forged.Secret[3] ^= 1
	if _, err := r.tryJoin(t, forged, newKey(t), "thief"); assay.KindOf(api.StatusError("join", err)) != assay.NotFound {
		t.Errorf("forged: %v", err)
	}
	// Another mesh's control is not taken for ours: nothing is sent to it.
	other := start(t, nil)
	fresh := r.token(t, "bank/*")
	if _, err := other.tryJoin(t, fresh, newKey(t), "node"); err == nil || !strings.Contains(err.Error(), "not the control that the token is for") {
		t.Errorf("another control: %v", err)
	}
	// A bad request spends no token.
	conn := r.dial(t, api.JoinTLS(fresh, time.Now))
	if _, err := api.NewHostsClient(conn).Join(t.Context(), &api.JoinRequest{Token: fresh.String(), Csr: []byte("x")}); assay.KindOf(api.StatusError("join", err)) != assay.Invalid {
		t.Errorf("bad request: %v", err)
	}
	c.advance(2 * time.Hour)
	if _, err := r.tryJoin(t, fresh, newKey(t), "late"); assay.KindOf(api.StatusError("join", err)) != assay.Denied {
		t.Errorf("expired: %v", err)
	}
	if _, err := r.tryJoin(t, token, key, "node"); assay.KindOf(api.StatusError("join", err)) != assay.Denied {
		t.Errorf("repeated after the token's end: %v", err)
	}
	// Whoever was removed cannot come back with what it has.
	third := r.token(t, "bank/*")
	if h, err = r.tryJoin(t, third, key, "node"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.operator(t).Delete(t.Context(), &api.DeleteRequest{Kind: "host", Name: h.id}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.tryJoin(t, third, key, "node"); err == nil {
		t.Error("a removed host joined again with its token")
	}
	r = r.restart(nil)
	if got := documents[api.HostView](t, r.operator(t), "hosts"); slices.ContainsFunc(got, func(v api.HostView) bool { return v.ID == h.id }) {
		t.Errorf("it is back after a restart: %s", show(got))
	}
	for _, bad := range [][]string{nil, {"bank"}, {"a/b", "*"}} {
		if _, err := r.operator(t).CreateToken(t.Context(), &api.CreateTokenRequest{Covers: bad, TtlSeconds: 60}); assay.KindOf(api.StatusError("token", err)) != assay.Invalid {
			t.Errorf("covers %v: %v", bad, err)
		}
	}
	for _, ttl := range []int64{-1, 0, 59, 8 * 86400, 1 << 62} {
		if _, err := r.operator(t).CreateToken(t.Context(), &api.CreateTokenRequest{Covers: []string{"a/b"}, TtlSeconds: ttl}); assay.KindOf(api.StatusError("token", err)) != assay.Invalid {
			t.Errorf("ttl %d: %v", ttl, err)
		}
	}
	if lines := show(documents[store.Token](t, r.operator(t), "tokens")); strings.Contains(lines, token.String()[24:40]) {
		t.Error("a list tells a token's secret")
	}
}

// TestExpiredHostIsCutOff: neither a call nor a stream outlives the certificate.
func TestExpiredHostIsCutOff(t *testing.T) {
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	h := r.join(t, "node", "*/*")
	a := syncHost(t, h.hosts, nil)
	renewed, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
	if err != nil || renewed.HostId != h.id {
		t.Fatalf("renew: %v, %v", renewed, err)
	}
	c.advance(8 * 24 * time.Hour)
	if _, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); assay.KindOf(api.StatusError("renew", err)) != assay.Denied {
		t.Errorf("after its end: %v", err)
	}
	a.up(a.workload("w1", "bank", "s", 1, 80))
	if err := a.waitEnd(); err == nil {
		t.Error("the stream goes on")
	}
}

// TestUnixSocketKnowsItsPeer connects as other users, in processes of their own.
func TestUnixSocketKnowsItsPeer(t *testing.T) {
	if socket := os.Getenv("ASSAY_TEST_SOCKET"); socket != "" {
		asSomebody(socket)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to become other users")
	}
	const group = 54321
	r := start(t, func(cfg *Config) { cfg.Viewers = group })
	if err := os.Chmod(r.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	// Others must be able to reach the socket and the test binary.
	for dir := r.socket[:strings.LastIndexByte(r.socket, '/')]; strings.Contains(dir, "Test"); dir = dir[:strings.LastIndexByte(dir, '/')] {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	self := strings.TrimSuffix(r.socket, "control.sock") + "test"
	if err := os.WriteFile(self, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		cred syscall.Credential
		want string
	}{
		{"root", syscall.Credential{}, "list ok, token ok"},
		{"stranger", syscall.Credential{Uid: 12345, Gid: 12345}, "list denied, token denied"},
		{"viewer by group", syscall.Credential{Uid: 12345, Gid: group}, "list ok, token denied"},
		{"viewer by second group", syscall.Credential{Uid: 12345, Gid: 12345, Groups: []uint32{7, group}}, "list ok, token denied"},
	} {
		cmd := exec.CommandContext(t.Context(), self, "-test.run=TestUnixSocketKnowsItsPeer")
		cmd.Env = append(os.Environ(), "ASSAY_TEST_SOCKET="+r.socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &tc.cred}
		cmd.Dir = "/"
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), tc.want) {
			t.Errorf("%s: %v\n%s", tc.name, err, out)
		}
	}
}

// asSomebody is the other process.
func asSomebody(socket string) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	o := api.NewOperatorClient(conn)
	say := func(err error) string {
		switch {
		case err == nil:
			return "ok"
		case assay.KindOf(api.StatusError("", err)) == assay.Denied:
			return "denied"
		}
		return err.Error()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, listErr := o.List(ctx, &api.ListRequest{Kind: "hosts"})
	_, tokenErr := o.CreateToken(ctx, &api.CreateTokenRequest{Covers: []string{"a/b"}, TtlSeconds: 60})
	fmt.Printf("list %s, token %s\n", say(listErr), say(tokenErr))
}
