package link

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func pair(t testing.TB) (*Conn, *Conn) {
	t.Helper()
	a, f, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func receive(t testing.TB, c *Conn) Message {
	t.Helper()
	m, err := c.Receive()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMessageWithDescriptors(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.Send(KindConfigure, 7, Configure{Workload: "w", Listeners: []string{ListenOutbound}}, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	m := receive(t, b)
	var c Configure
	if err := m.Decode(&c); err != nil || m.Kind != KindConfigure || m.ID != 7 || c.Workload != "w" || len(m.Files) != 1 {
		t.Fatalf("%+v, %+v, %v", m, c, err)
	}
	if flags, err := unix.FcntlInt(uintptr(m.Files[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("the descriptor would be inherited by a child")
	}
	unix.Write(m.Files[0], []byte("through"))
	m.Discard()
	if got, _ := io.ReadAll(r); string(got) != "through" {
		t.Errorf("%q came through the descriptor", got)
	}
}

// TestLastWords: what a peer sent before it closed arrives, also when it closed with
// something unread.
func TestLastWords(t *testing.T) {
	for range 20 {
		a, b := pair(t)
		if err := b.Send(KindAck, 0, Ack{Services: 1}); err != nil {
			t.Fatal(err)
		}
		if err := a.Send(KindDrain, 0, Drain{}); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if m := receive(t, b); m.Kind != KindDrain {
			t.Fatalf("%+v", m)
		}
		if _, err := b.Receive(); err != io.EOF {
			t.Fatalf("after the last words: %v", err)
		}
	}
}

// TestSizes sends bodies around and far beyond what fits a packet.
func TestSizes(t *testing.T) {
	a, b := pair(t)
	for _, n := range []int{0, 1, MaxInline - 300, MaxInline - 256, MaxInline, MaxInline + 1, 1 << 20, 8 << 20} {
		text := strings.Repeat("x", n)
		fd, err := unix.MemfdCreate("beside", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Send(KindServices, 1, text, fd); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		unix.Close(fd)
		m := receive(t, b)
		var got string
		if err := m.Decode(&got); err != nil || got != text {
			t.Errorf("%d bytes came back as %d, %v", n, len(got), err)
		}
		if len(m.Files) != 1 {
			t.Errorf("%d bytes: %d descriptors, want the one that was sent", n, len(m.Files))
		}
		m.Discard()
	}
}

// TestEncodedOnce sends one body to several, within a packet and beyond.
func TestEncodedOnce(t *testing.T) {
	for _, n := range []int{1, MaxInline, 1 << 20} {
		text := strings.Repeat("x", n)
		e, err := Encode(text)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			a, b := pair(t)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := a.Send(KindServices, 3, e, int(w.Fd())); err != nil {
				t.Fatal(err)
			}
			w.Close()
			m := receive(t, b)
			var got string
			if err := m.Decode(&got); err != nil || got != text || m.Kind != KindServices || m.ID != 3 || len(m.Files) != 1 {
				t.Errorf("%d bytes came as %d, %v, %s %d with %d descriptors", n, len(got), err, m.Kind, m.ID, len(m.Files))
			}
			m.Discard()
		}
	}
	if _, err := Encode(func() {}); err == nil {
		t.Error("what cannot be encoded is")
	}
}

func TestTheOtherEndIsGone(t *testing.T) {
	a, b := pair(t)
	a.Send(KindReady, 0, nil)
	a.Close()
	if m := receive(t, b); m.Kind != KindReady {
		t.Errorf("%+v", m)
	}
	if _, err := b.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("%v, want EOF", err)
	}
	if err := b.Send(KindReady, 0, nil); err == nil {
		t.Error("sent to nobody")
	}
}

// raw writes a packet as a broken or hostile peer would.
func raw(t *testing.T, c *Conn, packet string, files ...int) {
	t.Helper()
	var rights []byte
	if len(files) > 0 {
		rights = unix.UnixRights(files...)
	}
	if _, _, err := c.unix.WriteMsgUnix([]byte(packet), rights, nil); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesBadPackets(t *testing.T) {
	unsealed, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(unsealed)
	unix.Write(unsealed, []byte(`"x"`))
	for name, c := range map[string]struct {
		packet string
		files  []int
	}{
		"no JSON":              {"hello", nil},
		"large without a body": {`{"kind":"services","large":true}`, nil},
		"a body that changes":  {`{"kind":"services","large":true}`, []int{unsealed}},
		"too long":             {`{"kind":"x","body":"` + strings.Repeat("x", MaxInline+4096) + `"}`, nil},
		"cut short":            {`{"kind":"services","body":{`, nil},
	} {
		a, b := pair(t)
		before := descriptors(t)
		raw(t, a, c.packet, c.files...)
		if m, err := b.Receive(); err == nil {
			t.Errorf("%s: accepted as %+v", name, m)
			m.Discard()
		}
		if after := descriptors(t); after != before {
			t.Errorf("%s: %d descriptors were left", name, after-before)
		}
	}
	a, _ := pair(t)
	if err := a.Send(KindHello, 0, nil, 0, 0, 0, 0, 0, 0, 0, 0, 0); err == nil {
		t.Error("nine descriptors were sent")
	}
	if err := a.Send(KindHello, 0, func() {}); err == nil {
		t.Error("what is no JSON was sent")
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestDial(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if _, err := Dial(path); err == nil {
		t.Error("dialled nobody")
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	u, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	b := NewConn(u)
	defer b.Close()
	a.Send(KindHello, 0, Hello{PID: 7})
	var h Hello
	if m := receive(t, b); m.Decode(&h) != nil || h.PID != 7 {
		t.Errorf("%+v", h)
	}
}

func workloads() []assay.Workload {
	id := func(name string) assay.Identity {
		return assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: name}
	}
	addr := netip.MustParseAddr
	now := time.Now()
	return []assay.Workload{
		{ID: "w1", Identity: id("ledger"), Addrs: []netip.Addr{addr("10.181.7.2"), addr("fd5a:5a59::2")}, MeshedSince: now},
		{ID: "w2", Identity: id("web"), Addrs: []netip.Addr{addr("10.181.7.3")}, MeshedSince: now},
		{ID: "w3", Identity: id("ledger"), Addrs: []netip.Addr{addr("10.181.200.9")}, MeshedSince: now},
		{ID: "w4", Identity: id("early"), Addrs: []netip.Addr{addr("10.181.7.4")}}, // not meshed yet
	}
}

func TestTable(t *testing.T) {
	fd, err := BuildTable(42, workloads())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("the table can be written: %v", err)
	}
	table, err := OpenTable(fd)
	if err != nil {
		t.Fatal(err)
	}
	if table.Version() != 42 || table.Len() != 4 {
		t.Errorf("version %d, %d addresses", table.Version(), table.Len())
	}
	for a, want := range map[string]string{
		"10.181.7.2": "ledger w1", "::ffff:10.181.7.2": "ledger w1", "fd5a:5a59::2": "ledger w1", "10.181.7.3": "web w2",
		"10.181.200.9": "ledger w3", "10.181.7.4": "", "10.181.7.1": "", "255.255.255.255": "", "::": "", "fd5a:5a59::3": "",
	} {
		m, ok := table.Lookup(netip.MustParseAddr(a))
		if got := strings.TrimSpace(m.Identity.Account + " " + m.Workload); got != want || ok != (want != "") {
			t.Errorf("%s: %q, %v; want %q", a, got, ok, want)
		}
	}
	var none *AddressTable
	if _, ok := none.Lookup(netip.MustParseAddr("10.181.7.2")); ok {
		t.Error("no table knows somebody")
	}
}

func TestSibling(t *testing.T) {
	list := workloads()
	fd, err := BuildTable(1, list)
	if err != nil {
		t.Fatal(err)
	}
	table, err := OpenTable(fd)
	if err != nil {
		t.Fatal(err)
	}
	both := 0
	for _, w := range list {
		for _, a := range w.Addrs {
			for _, is4 := range []bool{true, false} {
				var want netip.Addr
				for _, b := range w.Addrs {
					if b.Is4() == is4 {
						want = b
					}
				}
				got, ok := table.Sibling(a, is4)
				if meshed := !w.MeshedSince.IsZero(); !meshed && ok || meshed && (got != want || ok != want.IsValid()) {
					t.Errorf("%s of %s: %v, %v; want %v", a, w.ID, got, ok, want)
				}
				if ok && got != a {
					both++
				}
			}
		}
	}
	if both == 0 {
		t.Error("no workload of the test has two families")
	}
}

func TestTableRefusesTwoOwners(t *testing.T) {
	list := workloads()
	list[1].Addrs = list[0].Addrs[:1]
	if fd, err := BuildTable(1, list); err == nil {
		unix.Close(fd)
		t.Error("one address has two owners")
	} else if !strings.Contains(err.Error(), "w1") || !strings.Contains(err.Error(), "w2") {
		t.Errorf("the error does not say whose: %v", err)
	}
}

// TestTableRefusesDamage opens every prefix of a table, and files that are no table.
func TestTableRefusesDamage(t *testing.T) {
	fd, err := BuildTable(1, workloads())
	if err != nil {
		t.Fatal(err)
	}
	whole, err := readAll(fd, maxBody)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	huge := bytes.Clone(whole)
	huge[16], huge[19] = 0xff, 0xff // more records than there are bytes
	bad := [][]byte{nil, []byte("hello"), append(bytes.Clone(whole), 0), huge, bytes.Replace(whole, []byte(tableMagic), []byte("assaytb2"), 1)}
	for n := range whole {
		bad = append(bad, whole[:n])
	}
	for _, b := range bad {
		fd, err := sealedCopy(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenTable(fd); err == nil {
			t.Errorf("%d bytes %.12q are a table", len(b), b)
		}
	}
	plain, err := unix.MemfdCreate("plain", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	unix.Write(plain, whole)
	if _, err := OpenTable(plain); err == nil {
		t.Error("a table that its sender can still change was opened")
	}
}

func FuzzTable(f *testing.F) {
	fd, err := BuildTable(1, workloads())
	if err != nil {
		f.Fatal(err)
	}
	whole, _ := readAll(fd, maxBody)
	unix.Close(fd)
	f.Add(whole)
	f.Add([]byte(tableMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		fd, err := sealedCopy(b)
		if err != nil {
			t.Skip()
		}
		table, err := OpenTable(fd)
		if err != nil {
			return
		}
		for i := range table.Len() {
			table.Lookup(netip.AddrFrom16([16]byte(table.records[i*recordSize:])))
		}
		table.Lookup(netip.MustParseAddr("10.181.7.2"))
	})
}

func BenchmarkLookup(b *testing.B) {
	list := make([]assay.Workload, 50_000)
	for i := range list {
		list[i] = assay.Workload{
			ID: "w", Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "ledger"},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 181, byte(i >> 8), byte(i)})}, MeshedSince: time.Now(),
		}
	}
	fd, err := BuildTable(1, list)
	if err != nil {
		b.Fatal(err)
	}
	table, err := OpenTable(fd)
	if err != nil {
		b.Fatal(err)
	}
	a := netip.MustParseAddr("10.181.77.3")
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := table.Lookup(a); !ok {
			b.Fatal("not found")
		}
	}
}

// TestTakenDescriptors: whoever took a message's descriptors may close them, and the
// numbers may be another's by the time that a copy of the message is discarded.
func TestTakenDescriptors(t *testing.T) {
	a, b := pair(t)
	if err := a.Send(KindHello, 0, nil, 0, 0); err != nil {
		t.Fatal(err)
	}
	m, err := b.Receive()
	if err != nil {
		t.Fatal(err)
	}
	other := m
	taken := m.Take()
	if len(taken) != 2 {
		t.Fatalf("%d descriptors, want 2", len(taken))
	}
	before := descriptors(t)
	m.Discard()
	other.Discard()
	if after := descriptors(t); after != before {
		t.Errorf("%d taken descriptors were closed", before-after)
	}
	for _, fd := range taken {
		unix.Close(fd)
	}
}

// TestTableBuilder: a table after many changes says what one that is made at once does, and is
// not much larger.
func TestTableBuilder(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	var b TableBuilder
	lives := map[netip.Addr]Meshed{}
	for i := range 4000 {
		a := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(64))})
		switch m := (Meshed{Identity: assay.Identity{TrustDomain: "test", Namespace: "bank", Account: fmt.Sprint("a", random.IntN(5))}, Workload: fmt.Sprint("workload-", random.IntN(1000))}); random.IntN(4) {
		case 0:
			_, was := lives[a]
			delete(lives, a)
			if b.Remove(a) != was {
				t.Fatalf("%s was there: %v", a, was)
			}
		case 1:
			if m, was := lives[a]; was && b.Set(a, m) {
				t.Fatalf("%s is new, and was %v", a, m)
			}
		default:
			if was, there := lives[a]; b.Set(a, m) != (!there || was != m) {
				t.Fatalf("%s was %v, is %v", a, was, m)
			}
			lives[a] = m
		}
		if i%500 == 499 {
			gone := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(64))})
			_, was := lives[gone]
			delete(lives, gone)
			if b.Retain(func(a netip.Addr) bool { return a != gone }) != was {
				t.Fatalf("%s was there: %v", gone, was)
			}
		}
		if i%100 != 99 {
			continue
		}
		fd, err := b.Build(uint64(i))
		if err != nil {
			t.Fatal(err)
		}
		table, err := OpenTable(fd)
		if err != nil {
			t.Fatal(err)
		}
		if table.Version() != uint64(i) || table.Len() != len(lives) || b.Len() != len(lives) || len(table.text) > 200*len(lives) {
			t.Fatalf("table %d of %d addresses, want %d; %d bytes of text", table.Version(), table.Len(), len(lives), len(table.text))
		}
		for n := range 64 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})
			want, there := lives[a]
			if got, found := table.Lookup(a); got != want || found != there {
				t.Fatalf("%s is %v, %v; want %v, %v", a, got, found, want, there)
			}
		}
	}
}
