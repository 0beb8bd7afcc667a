package routes

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"assay.dev/test/lab"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

// calls runs a gRPC server that says in its answers' heads who it is and what it saw.
func calls(t *testing.T, w *lab.World, name string) *lab.Workload {
	server := w.Workload(t, name, lab.Spec{Ports: []int{50051}})
	tell := func(ctx context.Context) metadata.MD {
		in, _ := metadata.FromIncomingContext(ctx)
		return metadata.Pairs("x-served-by", name, "x-saw", first(in.Get("x-set")))
	}
	srv := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			grpc.SetHeader(ctx, tell(ctx))
			return handle(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			s.SetHeader(tell(s.Context()))
			return handle(srv, s)
		}))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	reflection.Register(srv)
	l := server.Listen(t, 50051)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return server
}

func first(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

func TestGRPCRoutes(t *testing.T) {
	lab.Require(t, "ip", "nft")
	w := lab.NewWorld(t, lab.Meshed)
	server := calls(t, w, "calls")
	calls(t, w, "calls-v1")
	calls(t, w, "calls-v2")
	client := w.Workload(t, "caller", lab.Spec{})
	to := w.AwaitService(t, client, "calls", 50051)
	w.AwaitService(t, client, "calls-v1", 50051)
	w.AwaitService(t, client, "calls-v2", 50051)
	file := w.Write(t, "/tmp/grpc.yaml", `apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: r, namespace: default}
spec:
  parentRefs: [{group: "", kind: Service, name: calls, port: 50051}]
  rules:
  - matches:
    - method: {service: grpc.health.v1.Health, method: Check}
      headers: [{name: version, value: two}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: X-Set, value: "by the rule"}]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: X-Routed, value: "yes"}]}
    backendRefs: [{name: calls-v2, port: 50051}]
  - matches:
    - method: {service: grpc.health.v1.Health, method: Check}
    backendRefs: [{name: calls-v1, port: 50051}]
  - matches:
    - method: {method: ServerReflectionInfo}
`)
	w.MustExec(t, w.Mesh.Assay, "apply", "-f", file)
	conn, err := grpc.NewClient("passthrough:///calls:50051", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return client.Dial(to) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	check := func(pairs ...string) (metadata.MD, error) {
		var head metadata.MD
		_, err := healthpb.NewHealthClient(conn).Check(metadata.AppendToOutgoingContext(ctx, pairs...), &healthpb.HealthCheckRequest{}, grpc.Header(&head))
		return head, err
	}
	err = lab.WaitFor(ctx, 15*time.Second, func() error {
		if head, err := check(); err != nil || first(head.Get("x-served-by")) != "calls-v1" {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		head, err := check()
		t.Fatalf("the route is not followed: %v, %v", head, err)
	}
	head, err := check("version", "two", "x-set", "by the client")
	if err != nil || first(head.Get("x-served-by")) != "calls-v2" || first(head.Get("x-saw")) != "by the rule" || first(head.Get("x-routed")) != "yes" {
		t.Errorf("by its header: %v, %v", head, err)
	}
	stream, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := stream.Send(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if head, err := stream.Header(); err != nil || first(head.Get("x-served-by")) != "calls" {
		t.Errorf("a stream by its method: %v, %v", head, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
	watch, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("what no rule takes ended with %v", err)
	}

	// A client outside the mesh, here the host itself, that dials the workload follows them
	// as well: what is for the workload stays there, and the rest goes on.
	guest, err := grpc.NewClient("passthrough:///guest", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return w.Dial(netip.AddrPortFrom(server.IPv4, 50051))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	ask := func(pairs ...string) string {
		var head metadata.MD
		_, err := healthpb.NewHealthClient(guest).Check(metadata.AppendToOutgoingContext(ctx, pairs...), &healthpb.HealthCheckRequest{}, grpc.Header(&head))
		if err != nil {
			return err.Error()
		}
		return first(head.Get("x-served-by")) + first(head.Get("x-saw")) + first(head.Get("x-routed"))
	}
	for range 3 {
		if got := ask(); got != "calls-v1" {
			t.Errorf("a guest is answered by %s", got)
		}
		if got := ask("version", "two"); got != "calls-v2by the ruleyes" {
			t.Errorf("a guest is answered by %s", got)
		}
		infos, err := reflectpb.NewServerReflectionClient(guest).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := infos.CloseSend(); err != nil {
			t.Error(err)
		}
		if head, err := infos.Header(); err != nil || first(head.Get("x-served-by")) != "calls" {
			t.Errorf("a guest's stream by its method: %v, %v", head, err)
		}
	}
}
