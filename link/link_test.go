package link

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"golang.org/x/sys/unix"
)

func pair(t testing.TB) (near, far *Conn) {
	t.Helper()
	near, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	far, err = FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// descriptors counts what this process has open.
func descriptors(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestMessagesKeepOrderBodiesAndFiles(t *testing.T) {
	near, far := pair(t)
	before := descriptors(t)
	small := Services{Version: 1, Remove: []string{"core/payments"}}
	large := Services{Version: 2, Full: true}
	for i := range 4000 {
		large.Upsert = append(large.Upsert, assay.Service{Namespace: "core", Name: fmt.Sprintf("service-%d", i), Ports: []assay.Port{{Port: 80}}})
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		sent <- errors.Join(
			near.Send(KindServices, 0, small),
			near.Send(KindServices, 7, large, int(w.Fd())),
			near.Send(KindReady, 0, nil),
		)
	}()

	m, err := far.Receive()
	var got Services
	if err != nil || m.Kind != KindServices || m.ID != 0 || len(m.Files) != 0 || m.Decode(&got) != nil || got.Version != 1 || got.Remove[0] != "core/payments" {
		t.Fatalf("first: %+v, %v, %+v", m, err, got)
	}
	m, err = far.Receive()
	if err != nil || m.ID != 7 || len(m.Files) != 1 {
		t.Fatalf("second: %d files, %v", len(m.Files), err)
	}
	got = Services{}
	if err := m.Decode(&got); err != nil || len(got.Upsert) != 4000 || got.Upsert[3999].Name != "service-3999" {
		t.Fatalf("a large body arrived as %d services, %v", len(got.Upsert), err)
	}
	// The descriptor is the pipe, and close-on-exec.
	if flags, err := unix.FcntlInt(uintptr(m.Files[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("a received descriptor would leak into children: %v", err)
	}
	unix.Write(m.Files[0], []byte("x"))
	b := make([]byte, 1)
	if _, err := r.Read(b); err != nil || b[0] != 'x' {
		t.Errorf("the descriptor is not the pipe: %v", err)
	}
	m.Discard()
	if m, err = far.Receive(); err != nil || m.Kind != KindReady || m.Body != nil {
		t.Fatalf("third: %+v, %v", m, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	near.Close()
	if _, err := far.Receive(); err != io.EOF {
		t.Errorf("a closed peer gives %v, want EOF", err)
	}
}

func TestDialReachesASocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	s := NewConn(server)
	defer s.Close()
	if err := c.Send(KindHello, 0, Hello{PID: 42}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Receive()
	var h Hello
	if err != nil || m.Decode(&h) != nil || h.PID != 42 {
		t.Fatalf("%+v, %v", h, err)
	}
	if _, err := Dial(filepath.Join(t.TempDir(), "nobody")); err == nil {
		t.Error("dialled a socket that is not there")
	}
}

// TestHostilePeer sends what a compromised process would: the receiver reports an
// error, keeps no descriptor and does not crash.
func TestHostilePeer(t *testing.T) {
	open := func(name string, size int64) int {
		fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	unsealed := open("unsealed", 4096)
	huge := open("huge", maxBody+1)
	unix.FcntlInt(uintptr(huge), unix.F_ADD_SEALS, seals)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	many := make([]int, maxFiles+4)
	for i := range many {
		many[i] = int(null.Fd())
	}
	for _, c := range []struct {
		name, packet, want string
		files              []int
	}{
		{"not JSON", "hello", "invalid character", nil},
		{"not JSON with a descriptor", "hello", "invalid character", []int{int(null.Fd())}},
		{"an array", "[]", "cannot unmarshal", nil},
		{"a body that is not there", `{"kind":"report","large":true}`, "not attached", nil},
		{"an unsealed body", `{"kind":"report","large":true}`, "not a sealed memfd", []int{unsealed}},
		{"a body that is no memfd", `{"kind":"report","large":true}`, "not a sealed memfd", []int{int(null.Fd())}},
		{"a body beyond the bound", `{"kind":"report","large":true}`, "at most", []int{huge}},
		{"too many descriptors", `{"kind":"ready"}`, "cut short", many},
		{"a packet beyond the bound", `{"kind":"` + strings.Repeat("x", MaxInline+2048) + `"}`, "cut short", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := pair(t)
			before := descriptors(t)
			if _, _, err := near.Socket().WriteMsgUnix([]byte(c.packet), unix.UnixRights(c.files...), nil); err != nil {
				t.Fatal(err)
			}
			m, err := far.Receive()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %+v, %v; want an error with %q", m, err, c.want)
			}
			m.Discard()
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

func TestSendRefusesWhatCannotArrive(t *testing.T) {
	near, _ := pair(t)
	if err := near.Send(KindReady, 0, nil, make([]int, maxFiles+1)...); err == nil {
		t.Error("sent too many descriptors")
	}
	if err := near.Send(KindReady, 0, func() {}); err == nil {
		t.Error("sent a function")
	}
	if _, err := FileConn(must(os.Open(os.DevNull))); err == nil {
		t.Error("a file passes for a socket")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func meshed(id, account string, addrs ...string) assay.Workload {
	w := assay.Workload{ID: id, Identity: assay.Identity{TrustDomain: "td", Namespace: "core", Account: account}, MeshedSince: time.Unix(1, 0)}
	for _, a := range addrs {
		w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
	}
	return w
}

func TestTable(t *testing.T) {
	starting := meshed("w9", "late", "10.0.0.9")
	starting.MeshedSince = time.Time{}
	fd, err := BuildTable(7, []assay.Workload{
		meshed("w2", "payments", "10.0.0.2", "fd00::2"), meshed("w1", "web", "10.0.0.1", "fd00::1"),
		meshed("w3", "payments", "10.0.0.3"), starting,
	})
	if err != nil {
		t.Fatal(err)
	}
	table, err := OpenTable(fd)
	if err != nil || table.Version() != 7 || table.Len() != 5 {
		t.Fatalf("%+v, %v", table, err)
	}
	for addr, want := range map[string]string{
		"10.0.0.1": "w1", "fd00::1": "w1", "10.0.0.2": "w2", "::ffff:10.0.0.2": "w2", "fd00::2": "w2", "10.0.0.3": "w3",
		"10.0.0.4": "", "10.0.0.9": "", "::": "", "ffff::": "",
	} {
		m, ok := table.Lookup(netip.MustParseAddr(addr))
		if m.Workload != want || ok != (want != "") {
			t.Errorf("%s: %+v, want %q", addr, m, want)
		}
	}
	if m, _ := table.Lookup(netip.MustParseAddr("10.0.0.3")); m.Identity.Account != "payments" {
		t.Errorf("identity %v", m.Identity)
	}
	var none *AddressTable
	if _, ok := none.Lookup(netip.MustParseAddr("10.0.0.1")); ok {
		t.Error("no table knows somebody")
	}
	if _, err := BuildTable(8, []assay.Workload{meshed("a", "a", "10.0.0.1"), meshed("b", "b", "10.0.0.1")}); err == nil {
		t.Error("an address belongs to two workloads")
	}
	if fd, err := BuildTable(9, nil); err != nil {
		t.Error(err)
	} else if empty, err := OpenTable(fd); err != nil || empty.Len() != 0 {
		t.Error("an empty mesh has no table", err)
	}
}

func TestTableLookupDoesNotScan(t *testing.T) {
	var list []assay.Workload
	for i := range 20000 {
		list = append(list, meshed(fmt.Sprint("w", i), "payments", netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String()))
	}
	fd, err := BuildTable(1, list)
	if err != nil {
		t.Fatal(err)
	}
	table, err := OpenTable(fd)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 9999, 19998, 19999} {
		m, ok := table.Lookup(list[i].Addrs[0])
		if !ok || m.Workload != list[i].ID {
			t.Errorf("%v: %+v", list[i].Addrs[0], m)
		}
	}
	if size := len(table.records) + len(table.text); size > 40*20000 {
		t.Errorf("%d bytes for 20,000 addresses, more than 40 each", size)
	}
}

// FuzzTable reads mappings that no BuildTable made.
func FuzzTable(f *testing.F) {
	fd, err := BuildTable(1, []assay.Workload{meshed("w1", "web", "10.0.0.1", "fd00::1")})
	if err != nil {
		f.Fatal(err)
	}
	seed, err := readAll(fd)
	if err != nil {
		f.Fatal(err)
	}
	unix.Close(fd)
	f.Add(seed)
	f.Add(seed[:20])
	f.Fuzz(func(t *testing.T, b []byte) {
		fd, err := sealedCopy(b)
		if err != nil {
			t.Fatal(err)
		}
		table, err := OpenTable(fd)
		if err != nil {
			return
		}
		table.Lookup(netip.MustParseAddr("10.0.0.1"))
		table.Lookup(netip.MustParseAddr("fd00::1"))
	})
}

// FuzzReceive gives the agent's end what a compromised proxy may send.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"kind":"hello","body":{"pid":1}}`))
	f.Add([]byte(`{"kind":"report","id":3,"body":{"signals":[{"direction":"inbound","peer":"spiffe://td/ns/a/sa/b"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 || len(b) > MaxInline {
			return
		}
		near, far := pair(t)
		defer near.Close()
		defer far.Close()
		if _, err := near.Socket().Write(b); err != nil {
			t.Fatal(err)
		}
		m, err := far.Receive()
		if err != nil {
			return
		}
		for _, v := range []any{&Hello{}, &Report{}, &CSR{}, &Ack{}, &assay.Finding{}} {
			m.Decode(v)
		}
		if m.Body != nil && !json.Valid(bytes.TrimSpace(m.Body)) {
			t.Errorf("a body that is not JSON came through: %q", m.Body)
		}
	})
}
