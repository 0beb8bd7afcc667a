package programs

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"assay.dev/test/lab"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

func TestRPC(t *testing.T) { run(t, []scenario{{"grpc", nil, testGRPC}}) }

// testGRPC drives a gRPC server with health and reflection: unary calls, a server
// stream, a two-way stream, status codes and deadlines.
func testGRPC(t *testing.T, w *lab.World) {
	server := w.Workload(t, "rpc", lab.Spec{Ports: []int{50051}})
	client := w.Workload(t, "rpc-client", lab.Spec{})
	from := make(chan string, 1)
	srv := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if p, ok := peer.FromContext(ctx); ok {
			select {
			case from <- p.Addr.String():
			default:
			}
		}
		return handle(ctx, req)
	}))
	checks := health.NewServer()
	healthpb.RegisterHealthServer(srv, checks)
	reflection.Register(srv)
	l := server.Listen(t, 50051)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })

	to := w.AwaitService(t, client, "rpc", 50051)
	conn, err := grpc.NewClient("passthrough:///rpc:50051", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return client.Dial(to) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	// Reflection lists what there is.
	stream, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatalf("reflection: %v", err)
	}
	if err := stream.Send(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatalf("reflection: %v", err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatalf("reflection: %v", err)
	}
	var services []string
	for _, s := range answer.GetListServicesResponse().GetService() {
		services = append(services, s.GetName())
	}
	if !slices.Contains(services, "grpc.health.v1.Health") {
		t.Errorf("reflection lists %v", services)
	}
	if err := stream.CloseSend(); err != nil {
		t.Errorf("half-close: %v", err)
	}

	// Unary calls, many at once.
	h := healthpb.NewHealthClient(conn)
	errs := make(chan error, 200)
	for range cap(errs) {
		go func() { _, err := h.Check(ctx, &healthpb.HealthCheckRequest{}); errs <- err }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Fatalf("check: %v", err)
		}
	}
	if host, _, err := net.SplitHostPort(<-from); err != nil || host != client.IPv4.String() {
		t.Errorf("the server saw the client as %s, want %s", host, client.IPv4)
	}
	if _, err := h.Check(ctx, &healthpb.HealthCheckRequest{Service: "nothing"}); status.Code(err) != codes.NotFound {
		t.Errorf("status of an unknown service: %v, want NotFound", err)
	}

	// A server stream, seen as it happens.
	watch, err := h.Watch(ctx, &healthpb.HealthCheckRequest{Service: "till"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVICE_UNKNOWN, healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		m, err := watch.Recv()
		if err != nil || m.Status != want {
			t.Fatalf("watch: %v %v, want %v", m, err, want)
		}
		switch want {
		case healthpb.HealthCheckResponse_SERVICE_UNKNOWN:
			checks.SetServingStatus("till", healthpb.HealthCheckResponse_SERVING)
		case healthpb.HealthCheckResponse_SERVING:
			checks.SetServingStatus("till", healthpb.HealthCheckResponse_NOT_SERVING)
		}
	}
	// A deadline ends a stream without hurting the others.
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	quiet, err := h.Watch(short, &healthpb.HealthCheckRequest{Service: "till"})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = quiet.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("status after the deadline: %v", err)
	}
	if _, err := h.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("a call after another one's deadline: %v", err)
	}
}
