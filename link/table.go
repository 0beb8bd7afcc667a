package link

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"sort"

	"assay.dev"
	"golang.org/x/sys/unix"
)

// The table is one sealed memfd:
//
//	0   magic "assaytb1"
//	8   version       uint64
//	16  records       uint32
//	20  size of text  uint32
//	24  records, 28 bytes each, sorted by address
//	    then the text: identities and workload IDs, each one once
//
// A record is the address (16 bytes, IPv4 mapped as RFC 4291 section 2.5.5.2
// says), the offset and length of the identity (uint32, uint16), and those of
// the workload ID. Numbers are little-endian. It is read in place: a proxy's
// share of a table of 50,000 addresses is the pages that it looks at.
const (
	tableMagic  = "assaytb1"
	tableHeader = 24
	recordSize  = 28
)

// Meshed is what the table knows of an address.
type Meshed struct {
	Identity assay.Identity
	Workload string
}

// AddressTable is a read-only view of a table. It is safe for concurrent use and
// unmapped when it is no longer reachable.
type AddressTable struct {
	version uint64
	records []byte
	text    []byte
}

// BuildTable writes the table of all meshed workloads into a sealed memfd, which
// the caller closes.
func BuildTable(version uint64, workloads []assay.Workload) (int, error) {
	owner := map[netip.Addr]*assay.Workload{}
	for i := range workloads {
		w := &workloads[i]
		if w.MeshedSince.IsZero() {
			continue
		}
		for _, a := range w.Addrs {
			a = a.Unmap()
			if old := owner[a]; old != nil {
				return -1, fmt.Errorf("address table: %s belongs to %s and to %s", a, old.ID, w.ID)
			}
			owner[a] = w
		}
	}
	var b TableBuilder
	for _, a := range slices.SortedFunc(maps.Keys(owner), CompareInTable) {
		b.Set(a, Meshed{owner[a].Identity, owner[a].ID})
	}
	return b.Build(version)
}

// OpenTable maps a table and closes fd.
func OpenTable(fd int) (*AddressTable, error) {
	m, err := sealedMapping(fd, maxBody)
	unix.Close(fd)
	if err != nil {
		return nil, fmt.Errorf("address table: %w", err)
	}
	if len(m) < tableHeader || string(m[:8]) != tableMagic {
		return nil, fmt.Errorf("address table: not a table")
	}
	n := uint64(binary.LittleEndian.Uint32(m[16:])) * recordSize
	text := uint64(binary.LittleEndian.Uint32(m[20:]))
	if tableHeader+n+text != uint64(len(m)) {
		unix.Munmap(m)
		return nil, fmt.Errorf("address table: lengths do not add up")
	}
	t := &AddressTable{
		version: binary.LittleEndian.Uint64(m[8:]),
		records: m[tableHeader : tableHeader+n],
		text:    m[tableHeader+n:],
	}
	runtime.AddCleanup(t, func(m []byte) { unix.Munmap(m) }, m)
	return t, nil
}

// Version returns the snapshot that the table was made from.
func (t *AddressTable) Version() uint64 { return t.version }

// Len returns the number of addresses.
func (t *AddressTable) Len() int { return len(t.records) / recordSize }

// Lookup returns who lives at a. A nil table knows nobody.
func (t *AddressTable) Lookup(a netip.Addr) (Meshed, bool) {
	if t == nil {
		return Meshed{}, false
	}
	defer runtime.KeepAlive(t)
	key := a.Unmap().As16()
	i := sort.Search(t.Len(), func(i int) bool {
		return bytes.Compare(t.records[i*recordSize:i*recordSize+16], key[:]) >= 0
	})
	if i == t.Len() {
		return Meshed{}, false
	}
	r := t.records[i*recordSize : (i+1)*recordSize]
	if !bytes.Equal(r[:16], key[:]) {
		return Meshed{}, false
	}
	id, err := assay.ParseIdentity(t.string(r[16:]))
	if err != nil {
		return Meshed{}, false
	}
	return Meshed{Identity: id, Workload: t.string(r[22:])}, true
}

// Sibling returns an IPv4 (or IPv6) address of the workload that lives at a. It looks
// at every record: it is for what happens seldom.
func (t *AddressTable) Sibling(a netip.Addr, is4 bool) (netip.Addr, bool) {
	who, ok := t.Lookup(a)
	if !ok {
		return netip.Addr{}, false
	}
	defer runtime.KeepAlive(t)
	for i := range t.Len() {
		r := t.records[i*recordSize : (i+1)*recordSize]
		b := netip.AddrFrom16([16]byte(r[:16])).Unmap()
		if b.Is4() == is4 && int(binary.LittleEndian.Uint16(r[26:])) == len(who.Workload) && t.string(r[22:]) == who.Workload {
			return b, true
		}
	}
	return netip.Addr{}, false
}

// string copies a text out of the mapping; an offset beyond it yields "".
func (t *AddressTable) string(ref []byte) string {
	off, n := uint64(binary.LittleEndian.Uint32(ref)), uint64(binary.LittleEndian.Uint16(ref[4:]))
	if off+n > uint64(len(t.text)) {
		return ""
	}
	return string(t.text[off : off+n])
}
