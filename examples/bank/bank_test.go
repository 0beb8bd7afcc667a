package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"assay.dev/examples/bank/paymentspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bank is a whole bank on loopback.
type bank struct {
	web, ledger, payments, events string
	log                           *slog.Logger
}

type lineWriter struct{ t *testing.T }

func (w lineWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSuffix(p, []byte("\n")))
	return len(p), nil
}

func startBank(t *testing.T) *bank {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { stop(); wg.Wait() })
	b := &bank{log: slog.New(slog.NewTextHandler(lineWriter{t}, nil))}
	start := func(name string, run func(context.Context, net.Listener) error) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if err := run(ctx, ln); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		return ln.Addr().String()
	}
	ev, err := newEvents("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		if err := runEvents(ctx, ev); err != nil {
			t.Error(err)
		}
	})
	if !ev.ReadyForConnections(10 * time.Second) {
		t.Fatal("events does not start")
	}
	b.events = ev.Addr().String()
	nats := "nats://" + b.events
	j, err := OpenJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(); wg.Wait(); j.Close() })
	b.ledger = "http://" + start("ledger", (&Ledger{Events: nats, Journal: j, Log: b.log}).Run)
	a := &Accounts{Ledger: b.ledger, Count: 5, Log: b.log}
	if err := a.Open(ctx); err != nil {
		t.Fatal(err)
	}
	accounts := "http://" + start("accounts", a.Run)
	b.payments = start("payments", (&Payments{Accounts: accounts, Ledger: b.ledger, Events: nats, Log: b.log}).Run)
	b.web = "http://" + start("web", (&Web{Accounts: accounts, Payments: b.payments, Events: nats, Log: b.log}).Run)
	return b
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	c := newClient()
	defer c.CloseIdleConnections()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func post(t *testing.T, url, body string, header ...string) (int, string) {
	t.Helper()
	c := newClient()
	defer c.CloseIdleConnections()
	req, _ := http.NewRequest("POST", url, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestTransfer(t *testing.T) {
	b := startBank(t)
	one, two := accountID(1), accountID(2)
	order := fmt.Sprintf(`{"from":%q,"to":%q,"amount":1250,"currency":"EUR","text":"rent"}`, one, two)

	code, first := post(t, b.web+"/transfers", order, "Idempotency-Key", "k1")
	if code != http.StatusCreated {
		t.Fatalf("transfer: %d %s", code, first)
	}
	if code, again := post(t, b.web+"/transfers", order, "Idempotency-Key", "k1"); code != http.StatusCreated || again != first {
		t.Errorf("repeated: %d %s, first %s", code, again, first)
	}
	for id, want := range map[string]int64{one: openingBalance - 1250, two: openingBalance + 1250} {
		code, body := get(t, b.web+"/accounts/"+id)
		var a Account
		if err := json.Unmarshal([]byte(body), &a); code != 200 || err != nil || a.Balance != want {
			t.Errorf("%s: %d %s %v, want balance %d", id, code, body, err, want)
		}
	}

	refusals := []struct {
		name, key, body string
		want            int
	}{
		{"other content under the key", "k1", strings.Replace(order, "1250", "1251", 1), 409},
		{"unknown account", "k2", strings.Replace(order, one, accountID(99), 1), 404},
		{"more than there is", "k3", strings.Replace(order, "1250", "9999999999", 1), 422},
		{"negative", "k4", strings.Replace(order, "1250", "-1", 1), 400},
		{"to itself", "k5", strings.Replace(order, two, one, 1), 400},
		{"no number", "k6", strings.Replace(order, one, "DE00", 1), 400},
		{"unknown field", "k7", strings.Replace(order, "text", "memo", 1), 400},
		{"fraction", "k8", strings.Replace(order, "1250", "12.5", 1), 400},
		{"no key", "", order, 400},
	}
	for _, r := range refusals {
		if code, body := post(t, b.web+"/transfers", r.body, "Idempotency-Key", r.key); code != r.want {
			t.Errorf("%s: %d %s, want %d", r.name, code, body, r.want)
		}
	}

	code, body := get(t, b.web+"/accounts/"+one+"/statement")
	if lines := strings.Split(strings.TrimSpace(body), "\n"); code != 200 || len(lines) != 2 || !strings.Contains(lines[1], `"text":"rent"`) {
		t.Errorf("statement: %d %s", code, body)
	}
	if code, body := get(t, b.web+"/accounts/"+one+"/statement?after=1000"); code != 200 || body != "" {
		t.Errorf("empty statement: %d %q", code, body)
	}
	if code, _ := get(t, b.web+"/accounts/"+accountID(99)+"/statement"); code != 404 {
		t.Errorf("statement of no account: %d", code)
	}

	if code, body := get(t, b.web+"/"); code != 200 || !strings.Contains(body, one) {
		t.Errorf("page: %d %s", code, body)
	}
	form := url.Values{"key": {"f1"}, "from": {one}, "to": {two}, "amount": {"5"}}.Encode()
	if code, body := post(t, b.web+"/transfers", form, "Content-Type", "application/x-www-form-urlencoded"); code != 200 || !strings.Contains(body, two) {
		t.Errorf("form: %d %s", code, body)
	}
}

// audit waits until the ledger has heard want announcements.
func audit(t *testing.T, b *bank, want int64) Audit {
	t.Helper()
	var a Audit
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, body := get(t, b.ledger+"/audit")
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			t.Fatal(err)
		}
		if a.Booked >= want || time.Now().After(end) {
			return a
		}
	}
}

func TestLoad(t *testing.T) {
	b := startBank(t)
	var out, errs bytes.Buffer
	err := run(t.Context(), []string{"load", "--target", b.web + "/", "--accounts", "5", "--count", "300", "--rate", "0", "--duration", "0"}, &out, &errs)
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out.Bytes(), errs.Bytes())
	}
	var s Summary
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	if s.Requests != 300 || s.Failures != 0 || s.Transfers == 0 || s.Reads == 0 || s.LatencyMS.P50 <= 0 || s.LatencyMS.Max < s.LatencyMS.P99 {
		t.Errorf("%s", out.Bytes())
	}
	a := audit(t, b, s.Transfers)
	if a.Sum != 0 || a.Unknown != 0 || a.Booked != s.Transfers || a.Requested != s.Transfers || int64(a.Entries) != s.Transfers+5 {
		t.Errorf("audit %+v after %d transfers", a, s.Transfers)
	}
}

func TestLoadFails(t *testing.T) {
	n := 0
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n++; n > 1 { // the first answer only says that web is there
			http.Error(w, "no", http.StatusInternalServerError)
		}
	}))
	defer broken.Close()
	var out bytes.Buffer
	err := run(t.Context(), []string{"load", "--target", broken.URL, "--clients", "1", "--count", "7", "--rate", "0"}, &out, io.Discard)
	if !errors.Is(err, errLoad) || !strings.Contains(out.String(), `"failures":7`) {
		t.Errorf("%v %s", err, out.Bytes())
	}
	err = run(t.Context(), []string{"load", "--target", "http://127.0.0.1:1", "--wait", "1ms"}, &out, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("nobody there: %v", err)
	}
}

func TestLoadKeepsItsRate(t *testing.T) {
	b := startBank(t)
	l := &Load{Target: b.web, Accounts: 5, Clients: 4, Rate: 50, Duration: time.Second, Wait: 10 * time.Second, Fresh: true, Log: b.log}
	s, err := l.Run(t.Context())
	if err != nil || s.Failures > 0 {
		t.Fatal(err, s)
	}
	if s.Requests > 51 || s.Transfers != 0 {
		t.Errorf("asked for 50/s for 1 s without transfers: %+v", s)
	}
}

func TestProbe(t *testing.T) {
	b := startBank(t)
	var out bytes.Buffer
	if err := run(t.Context(), []string{"probe", "--target", b.events, "--count", "3"}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var s ProbeSummary
	if err := json.Unmarshal(out.Bytes(), &s); err != nil || len(s.Probed.MS) != 3 || len(s.Direct.MS) != 3 || s.Probed.Max < s.Probed.P50 || s.Direct.P50 <= 0 {
		t.Errorf("%s %v", out.Bytes(), err)
	}
	if err := run(t.Context(), []string{"probe", "--target", b.events, "--want", "SSH-"}, &out, io.Discard); err == nil {
		t.Error("a NATS server passed for SSH")
	}
}

func TestGRPC(t *testing.T) {
	b := startBank(t)
	cc, err := grpc.NewClient(b.payments, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	h, err := healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{Service: paymentspb.Payments_ServiceDesc.ServiceName})
	if err != nil || h.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v %v", h, err)
	}
	stream, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}
	if err := stream.Send(ask); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil || !strings.Contains(answer.String(), "bank.v1.Payments") {
		t.Errorf("reflection: %v %v", answer, err)
	}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	open := func() *Journal {
		j, err := OpenJournal(path)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	j := open()
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			e := Entry{Key: fmt.Sprint("k", n), From: ownAccount, To: accountID(1 + n%3), Amount: int64(n + 1), Currency: Currency}
			if got, fresh, err := j.Book(e, now); err != nil || !fresh || got.Seq == 0 {
				t.Error(got, fresh, err)
			}
		})
	}
	wg.Wait()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}

	// A crash in the middle of a write leaves half a line.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString(`{"seq":51,"key":"half`)
	f.Close()
	j = open()
	if n, sum := j.Totals(); n != 50 || sum != 0 {
		t.Errorf("after the crash: %d entries, sum %d", n, sum)
	}
	if b, _ := j.Balance(ownAccount); b != -50*51/2 {
		t.Errorf("own account: %s", money(b))
	}
	again := Entry{Key: "k0", From: ownAccount, To: accountID(1), Amount: 1, Currency: Currency}
	if got, fresh, err := j.Book(again, now); err != nil || fresh || got.Key != "k0" {
		t.Errorf("key forgotten: %+v %v %v", got, fresh, err)
	}
	again.Key = "k51"
	if got, _, err := j.Book(again, now); err != nil || got.Seq != 51 {
		t.Errorf("%+v %v", got, err)
	}

	// When the disk fails nothing is confirmed any more.
	j.file.Close()
	again.Key = "k52"
	if _, _, err := j.Book(again, now); err == nil {
		t.Error("booked without a disk")
	}
	again.Key = "k53"
	if _, _, err := j.Book(again, now); err == nil {
		t.Error("booked after the disk failed")
	}

	// A gap is damage, not a crash.
	if err := os.WriteFile(path, []byte("{\"seq\":2}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(path); err == nil || !strings.Contains(err.Error(), "entry 2 follows entry 0") {
		t.Errorf("gap: %v", err)
	}
}

func TestMoney(t *testing.T) {
	for minor, want := range map[int64]string{0: "0.00", 5: "0.05", -5: "-0.05", 1250: "12.50", -123456: "-1234.56", -1 << 63: "-92233720368547758.08"} {
		if got := money(minor); got != want {
			t.Errorf("money(%d) = %s, want %s", minor, got, want)
		}
	}
}

func TestCommands(t *testing.T) {
	for _, args := range [][]string{nil, {"nonsense"}, {"web", "extra"}, {"web", "--nonsense"}, {"accounts", "--count", "1"},
		{"load", "--clients", "0"}, {"probe", "--count", "0"}, {"events", "--listen", "nowhere"}, {"ledger", "--file", "/"}} {
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("bank %v: no error", args)
		}
	}
	if err := run(t.Context(), []string{"help"}, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
}
