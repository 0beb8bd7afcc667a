package control

import (
	"fmt"
	"slices"
	"testing"

	"assay.dev/api"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// sentDeltas is the sending half of a stream that keeps what is sent, as its reader gets it.
type sentDeltas struct {
	grpc.ServerStream
	t    *testing.T
	sent []*api.ControlUpdate
}

func (s *sentDeltas) SendMsg(v any) error {
	s.t.Helper()
	data, err := newCodec().Marshal(v)
	if err != nil {
		return err
	}
	defer data.Free()
	if len(data) != 1 || data[0].Len() > max(32<<10, v.(*deltaPage).upsertSize()) {
		s.t.Errorf("%d buffers, of %d bytes", len(data), data.Len())
	}
	u := &api.ControlUpdate{}
	s.sent = append(s.sent, u)
	return newCodec().Unmarshal(data, u)
}

func (p *deltaPage) upsertSize() int {
	if len(p.upsert) != 1 {
		return 0
	}
	return 64 + p.upsert[0].size()
}

// TestDeltasFitBuffers: a delta is cut where a message would need a larger buffer than gRPC's
// of 32 KB, and only there; what is larger by itself travels alone. What arrives is what was put.
func TestDeltasFitBuffers(t *testing.T) {
	const buffer = 32 << 10
	s := newSnapshot(1)
	s.version = 1<<21 - 150 // versions of three and of four bytes
	for i := range 1000 {
		s.put(fmt.Sprint("workload/", i), resource("gone"))
	}
	after := s.version
	for i := range 1000 {
		s.remove(fmt.Sprint("workload/", i))
	}
	want := map[string]*api.Resource{}
	for i := range 300 {
		size := 100 + i*37%1500
		if i == 150 {
			size = 2 * buffer
		}
		r := &api.Resource{Body: &api.Resource_Route{Route: &api.Route{Json: make([]byte, size)}}}
		if i%2 == 1 {
			r = &api.Resource{Body: &api.Resource_Workload{Workload: &api.Workload{Id: fmt.Sprint(i), Labels: map[string]string{"a": "1", "b": "2", "c": "3"}}}}
		}
		key := fmt.Sprint("route/", i)
		s.put(key, r)
		if s.put(key, proto.CloneOf(r)) {
			t.Errorf("%s: the same again is a change", key)
		}
		r.Key, r.Version = key, s.version
		want[key] = r
	}
	ch, ok := s.since(after)
	if !ok {
		t.Fatal("removals are forgotten")
	}
	ch.revision = 11
	got := sentDeltas{t: t}
	if err := sendDelta(&got, &ch); err != nil {
		t.Fatal(err)
	}
	var whole api.Delta
	total := 0
	for i, u := range got.sent {
		d, size := u.GetDelta(), proto.Size(u)
		if total += size; size > buffer && len(d.Upsert) != 1 {
			t.Errorf("message %d has %d bytes for %d resources", i, size, len(d.Upsert))
		}
		if last := i == len(got.sent)-1; d.Complete != last || d.Version != s.version || d.Revision != 11 {
			t.Errorf("message %d of %d: complete %v, version %d, revision %d", i, len(got.sent), d.Complete, d.Version, d.Revision)
		}
		whole.Remove, whole.Upsert = append(whole.Remove, d.Remove...), append(whole.Upsert, d.Upsert...)
	}
	if !slices.Equal(whole.Remove, ch.remove) || len(whole.Upsert) != len(want) {
		t.Errorf("%d of %d removals, %d of %d resources, or another order", len(whole.Remove), len(ch.remove), len(whole.Upsert), len(want))
	}
	for _, r := range whole.Upsert {
		if !proto.Equal(r, want[r.Key]) || !proto.Equal(r, s.get(r.Key)) {
			t.Errorf("%s is %v, want %v", r.Key, r, want[r.Key])
		}
	}
	if most := total/(buffer-2048) + 3; len(got.sent) > most {
		t.Errorf("%d messages for %d bytes, want %d at most", len(got.sent), total, most)
	}
}

// BenchmarkEverything is what it costs to tell a host of 5,000 workloads in 1,000 services.
func BenchmarkEverything(b *testing.B) {
	s := newSnapshot(1)
	for i := range 5000 {
		s.put(fmt.Sprint("workload/", i), &api.Resource{Body: &api.Resource_Workload{Workload: &api.Workload{
			Id: fmt.Sprintf("%036d", i), Namespace: "payments", Name: "payments-api", Host: "node-0123456789abcdef", Identity: "spiffe://bank.test/ns/payments/sa/payments-api",
			Addrs: [][]byte{make([]byte, 4)}, Labels: map[string]string{"app": "payments-api", "pod-template-hash": "5f7d8c9b6d", "version": "v1"}, Listening: []uint32{8080}}}})
	}
	for i := range 1000 {
		service := &api.Service{Namespace: "payments", Name: fmt.Sprint("s", i), Ports: []*api.Port{{Name: "http", Port: 80}}}
		for j := range 5 {
			service.Endpoints = append(service.Endpoints, &api.Endpoint{Workload: fmt.Sprintf("%036d", 5*i+j), Identity: "spiffe://bank.test/ns/payments/sa/payments-api", Addrs: [][]byte{make([]byte, 4)}, Targets: []uint32{8080}})
		}
		s.put(fmt.Sprint("service/payments/s", i), &api.Resource{Body: &api.Resource_Service{Service: service}})
	}
	b.ReportAllocs()
	for b.Loop() {
		ch := s.resume(99, nil)
		if err := sendDelta(discard{}, &ch); err != nil {
			b.Fatal(err)
		}
	}
}

// discard encodes what is sent.
type discard struct{ grpc.ServerStream }

func (discard) SendMsg(v any) error {
	data, err := newCodec().Marshal(v)
	data.Free()
	return err
}
