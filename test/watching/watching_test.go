// Package watching looks at requests while they happen: through taps, in access logs, as
// spans. Who may look, what is never shown, and that nobody waits for it.
package watching

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/test/lab"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { lab.Main(m) }

const (
	port      = 8080
	portGRPC  = 9000
	collector = 4318
	secret    = "hunter2"
	traceID   = "4bf92f3577b34da6a3ce929d0e0e4736"
	spanID    = "00f067aa0ba902b7"
)

// stage is a server that answers with the status that is asked for, and a client.
type stage struct {
	*lab.World
	client *lab.Workload
}

func newStage(t *testing.T, args ...string) *stage {
	t.Helper()
	return newStageIn(t, lab.New(t), args...)
}

func newStageIn(t *testing.T, l *lab.Lab, args ...string) *stage {
	t.Helper()
	lab.Require(t, "ip", "nft", "getent", "curl")
	s := &stage{World: &lab.World{Lab: l, Mode: lab.Meshed}}
	s.Mesh = l.StartMesh(t, args...)
	t.Cleanup(func() { s.Mesh.Finish(t) })
	server := s.Workload(t, "payments", lab.Spec{Ports: []int{port}})
	s.client = s.Workload(t, "web", lab.Spec{})
	web := server.Listen(t, port)
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status := 200
		fmt.Sscanf(r.URL.Path, "/status/%d", &status)
		w.WriteHeader(status)
	})}
	done := make(chan struct{})
	go func() { defer close(done); app.Serve(web) }()
	t.Cleanup(func() { app.Close(); <-done })
	s.AwaitService(t, s.client, "payments", port)
	return s
}

// ask sends a request that is full of secrets.
func (s *stage) ask(t *testing.T, path string) {
	t.Helper()
	s.client.MustExec(t, "curl", "-sS", "-o", "/dev/null", "-H", "Authorization: Bearer "+secret, "-H", "X-Api-Key: "+secret, "-b", "session="+secret,
		"-H", "X-Colour: green", "-H", "traceparent: 00-"+traceID+"-"+spanID+"-01", fmt.Sprintf("http://payments:%d%s?password=%s", port, path, secret))
}

func decode(t *testing.T, lines string) (list []assay.Record) {
	t.Helper()
	scan := bufio.NewScanner(strings.NewReader(lines))
	for scan.Scan() {
		var r assay.Record
		if err := json.Unmarshal(scan.Bytes(), &r); err != nil {
			t.Fatalf("%q: %v", scan.Text(), err)
		}
		list = append(list, r)
	}
	return list
}

func TestTap(t *testing.T) {
	s := newStage(t)
	tap := s.Start(t, s.Mesh.Assay, "tap", "payments", "--status", "5xx", "--fields", "-o", "json")
	lab.Eventually(t, 20*time.Second, "a request is told", func() error {
		s.ask(t, "/status/200")
		s.ask(t, "/status/503")
		if tap.Output() == "" {
			return fmt.Errorf("nothing yet")
		}
		return nil
	})
	out := tap.Output()
	if strings.Contains(out, secret) {
		t.Errorf("a secret is told:\n%s", out)
	}
	r := decode(t, out)[0]
	if r.Status != 503 || r.Path != "/status/503" || r.Query != assay.Redacted || r.Method != "GET" || r.Direction != assay.Inbound ||
		r.Peer.Account != "web" || r.Identity.Account != "payments" || r.Security != assay.MutualTLS || r.Service != "default/payments" {
		t.Errorf("told %+v", r)
	}
	value := func(name string) string {
		i := slices.IndexFunc(r.Fields, func(f assay.HeaderField) bool { return strings.EqualFold(f.Name, name) })
		if i < 0 {
			return "none"
		}
		return r.Fields[i].Value
	}
	for name, want := range map[string]string{"Authorization": assay.Redacted, "Cookie": assay.Redacted, "X-Api-Key": assay.Redacted, "X-Colour": "green"} {
		if got := value(name); got != want {
			t.Errorf("%s is told as %q, want %q", name, got, want)
		}
	}
	if code, willingly := tap.Stop(5 * time.Second); code != 0 || !willingly {
		t.Errorf("tap ended with %d", code)
	}

	// What is asked for by name is shown, and so is who asked.
	tap = s.Start(t, s.Mesh.Assay, "tap", "payments", "--reveal", "query,authorization", "--fields", "-o", "json", "--count", "1")
	lab.Eventually(t, 20*time.Second, "the tap has had enough", func() error {
		s.ask(t, "/status/200")
		if !tap.Ended() {
			return fmt.Errorf("it goes on")
		}
		return nil
	})
	if r := decode(t, tap.Output())[0]; r.Query != "password="+secret || r.Fields == nil {
		t.Errorf("told %+v", r)
	}
	audit := s.MustExec(t, s.Mesh.Assay, "get", "audit", "-o", "json")
	if !strings.Contains(audit, `"Tap"`) || !strings.Contains(audit, "authorization") {
		t.Errorf("the audit trail says nothing of the tap:\n%s", audit)
	}

	// A flood is bounded and said.
	tap = s.Start(t, s.Mesh.Assay, "tap", "payments", "--rate", "1")
	lab.Eventually(t, 30*time.Second, "it is said how much is left out", func() error {
		for range 5 {
			s.ask(t, "/status/200")
		}
		if !strings.Contains(tap.Output(), "more that are not shown") {
			return fmt.Errorf("%s", tap.Output())
		}
		return nil
	})
	tap.Stop(5 * time.Second)
	if r := s.Exec(t, s.Mesh.Assay, "tap", "nobody"); r.Code == 0 || !strings.Contains(r.Stderr, "there is no service default/nobody") {
		t.Errorf("a service that is none: %d %s", r.Code, r.Stderr)
	}
}

func TestTapTakesAnOperator(t *testing.T) {
	s := newStage(t, "--listen", "127.0.0.1:7443")
	dir := s.Dir(t, "/tmp/certs", "")
	defer os.RemoveAll(s.Path(dir))
	s.MustExec(t, s.Mesh.Assay, "operator", "create", "eve", "--role", "viewer", "--dir", dir)
	as := func(args ...string) lab.Result {
		return s.Exec(t, append(append([]string{s.Mesh.Assay}, args...), "--control", "127.0.0.1:7443",
			"--cert", dir+"/eve.crt", "--key", dir+"/eve.key", "--ca", dir+"/eve-ca.crt")...)
	}
	if r := as("edges", "--interval", "0"); r.Code != 0 {
		t.Fatalf("a viewer may look at edges: %s", r.Stderr)
	}
	if r := as("tap", "payments"); r.Code == 0 || !strings.Contains(r.Stderr, "it takes an operator") {
		t.Errorf("a viewer taps: %d %s", r.Code, r.Stderr)
	}
	if audit := s.MustExec(t, s.Mesh.Assay, "get", "audit", "-o", "json"); !strings.Contains(audit, `"Tap"`) {
		t.Errorf("the refusal is not recorded:\n%s", audit)
	}
}

// collect is a collector of spans, as OTLP over HTTP has it.
type collect struct {
	mu    sync.Mutex
	spans map[string][]*trace.Span // by the workload's name
}

func (c *collect) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var data trace.TracesData
	if err == nil {
		err = proto.Unmarshal(body, &data)
	}
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		http.Error(w, fmt.Sprint(err), 400)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range data.GetResourceSpans() {
		name := ""
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				name = a.GetValue().GetStringValue()
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			c.spans[name] = append(c.spans[name], ss.GetSpans()...)
		}
	}
}

func TestLogsAndTraces(t *testing.T) {
	s := newStage(t, "--otlp", fmt.Sprintf("http://127.0.0.1:%d", collector))
	c := &collect{spans: map[string][]*trace.Span{}}
	server := &http.Server{Handler: c}
	l := s.Listen(t, collector)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })

	logFile := s.Path(filepath.Join(s.Mesh.Data, "access.log"))
	s.ask(t, "/before")
	file := s.Write(t, "/tmp/mesh.yaml", "apiVersion: assay.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: default}\nspec: {accessLog: 100%, traces: true}\n")
	defer os.Remove(s.Path(file))
	s.MustExec(t, s.Mesh.Assay, "apply", "-f", file)
	log := ""
	lab.Eventually(t, 20*time.Second, "both proxies have logged a request, and both made spans", func() error {
		s.ask(t, "/after")
		b, err := os.ReadFile(logFile)
		if err != nil {
			return err
		}
		log = string(b)
		c.mu.Lock()
		defer c.mu.Unlock()
		if !strings.Contains(log, `"direction":"inbound"`) || !strings.Contains(log, `"direction":"outbound"`) || len(c.spans["web"]) == 0 || len(c.spans["payments"]) == 0 {
			return fmt.Errorf("the log:\n%s%d spans of web, %d of payments", log, len(c.spans["web"]), len(c.spans["payments"]))
		}
		return nil
	})
	if strings.Contains(log, secret) || strings.Contains(log, "/before") {
		t.Errorf("the log holds a secret, or what nobody asked for:\n%s", log)
	}
	for _, r := range decode(t, log) {
		if r.Status != 200 || r.Path != "/after" || r.Duration <= 0 || r.Time.IsZero() || r.Fields != nil {
			t.Errorf("logged %+v", r)
		}
	}
	if st, err := os.Stat(logFile); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the log's mode is %v, %v", st.Mode(), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, kind := range map[string]trace.Span_SpanKind{"web": trace.Span_SPAN_KIND_CLIENT, "payments": trace.Span_SPAN_KIND_SERVER} {
		span := c.spans[name][0]
		if hex.EncodeToString(span.GetTraceId()) != traceID || hex.EncodeToString(span.GetParentSpanId()) != spanID || span.GetKind() != kind ||
			span.GetEndTimeUnixNano() <= span.GetStartTimeUnixNano() || strings.Contains(span.String(), secret) {
			t.Errorf("a span of %s: %s", name, span)
		}
	}
}

// TestTapOfCalls taps gRPC, whose result is in its trailers.
func TestTapOfCalls(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed)
	server := w.Workload(t, "rpc", lab.Spec{Ports: []int{portGRPC}})
	client := w.Workload(t, "caller", lab.Spec{})
	srv := grpc.NewServer()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	l := server.Listen(t, portGRPC)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	to := w.AwaitService(t, client, "rpc", portGRPC)
	conn, err := grpc.NewClient("passthrough:///rpc", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return client.Dial(to) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tap := w.Start(t, w.Mesh.Assay, "tap", "rpc", "--path", "/grpc.health.v1.Health/", "--fields", "-o", "json", "--count", "1")
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-api-token", secret, "x-colour", "green")
	lab.Eventually(t, 20*time.Second, "a call is told", func() error {
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: "nobody"})
		if status.Code(err) != codes.NotFound {
			return err
		}
		if !tap.Ended() {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	r := decode(t, tap.Output())[0]
	if r.Protocol != assay.HTTP2 || r.Method != "POST" || r.Path != "/grpc.health.v1.Health/Check" || r.Status != 200 ||
		r.GRPC == nil || r.GRPC.Code != int(codes.NotFound) || r.GRPC.RequestMessages != 1 || strings.Contains(tap.Output(), secret) {
		t.Errorf("told %s", tap.Output())
	}
}

// TestWatchingThatHangs: a log that is a pipe which nobody reads, and a collector that
// never answers, hold up nothing: not requests, not taps, not who comes new, and not the
// end of `assay up`.
func TestWatchingThatHangs(t *testing.T) {
	const pipe, metrics = "/tmp/access.fifo", "127.0.0.1:9191"
	lab.Require(t, "mkfifo")
	l := lab.New(t)
	l.MustExec(t, "mkfifo", pipe)
	t.Cleanup(func() { os.Remove(l.Path(pipe)) })
	s := newStageIn(t, l, "--otlp", fmt.Sprintf("http://127.0.0.1:%d", collector), "--access-log", pipe, "--metrics", metrics)
	deaf := s.Listen(t, collector) // the kernel takes connections, and nobody accepts them
	defer deaf.Close()
	file := s.Write(t, "/tmp/mesh.yaml", "apiVersion: assay.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default, namespace: default}\nspec: {accessLog: 100%, traces: true}\n")
	defer os.Remove(s.Path(file))
	s.MustExec(t, s.Mesh.Assay, "apply", "-f", file)
	var urls []string
	for range 200 {
		urls = append(urls, fmt.Sprintf("http://payments:%d/%s", port, strings.Repeat("x", 500)))
	}
	lab.Eventually(t, 2*time.Minute, "lines and spans are left out", func() error {
		s.client.MustExec(t, append([]string{"curl", "-sS", "-o", "/dev/null", "-H", "traceparent: 00-" + traceID + "-" + spanID + "-01"}, urls...)...)
		out := s.MustExec(t, "curl", "-sS", "http://"+metrics+"/metrics")
		for _, line := range []string{"assay_access_log_dropped_total 0\n", "assay_spans_dropped_total 0\n"} {
			if strings.Contains(out, line) {
				return fmt.Errorf("%s", line)
			}
		}
		return nil
	})
	tap := s.Start(t, s.Mesh.Assay, "tap", "payments", "-o", "json", "--count", "1")
	lab.Eventually(t, 30*time.Second, "a tap tells of a request", func() error {
		s.ask(t, "/status/200")
		if !tap.Ended() {
			return fmt.Errorf("nothing yet")
		}
		return nil
	})
	s.Workload(t, "late", lab.Spec{Ports: []int{port}})
	lab.Eventually(t, 30*time.Second, "who comes new has a certificate", func() error {
		if out := s.MustExec(t, s.Mesh.Assay, "get", "certificates"); !strings.Contains(out, "/sa/late") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}
