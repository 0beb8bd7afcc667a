package link

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"sort"
)

// TableBuilder is a table that changes: one change costs little beside the table that is
// written then. The zero value is empty. It is not safe for concurrent use.
type TableBuilder struct {
	records []byte
	text    []byte
	at      map[string]uint32 // in text
	unused  int               // bytes of text, about
}

// CompareInTable is the order of addresses in a table. A large one is best made in it.
func CompareInTable(x, y netip.Addr) int {
	a, b := x.As16(), y.As16()
	return bytes.Compare(a[:], b[:])
}

// Len returns the number of addresses.
func (b *TableBuilder) Len() int { return len(b.records) / recordSize }

// find returns where the record of an address is, or would be.
func (b *TableBuilder) find(a netip.Addr) (at int, there bool) {
	key := a.As16()
	i := sort.Search(b.Len(), func(i int) bool { return bytes.Compare(b.records[i*recordSize:i*recordSize+16], key[:]) >= 0 })
	at = i * recordSize
	return at, at < len(b.records) && bytes.Equal(b.records[at:at+16], key[:])
}

// Set says who lives at a, and reports whether that is new.
func (b *TableBuilder) Set(a netip.Addr, m Meshed) bool {
	at, there := b.find(a)
	id := m.Identity.String()
	if there {
		if b.string(at+16) == id && b.string(at+22) == m.Workload {
			return false
		}
		b.unused += b.size(at)
	} else {
		b.records = slices.Insert(b.records, at, make([]byte, recordSize)...)
	}
	key := a.As16()
	b.write(at, key, id, m.Workload)
	return true
}

// Remove forgets a, and reports whether somebody lived there.
func (b *TableBuilder) Remove(a netip.Addr) bool {
	at, there := b.find(a)
	if there {
		b.unused += b.size(at)
		b.records = slices.Delete(b.records, at, at+recordSize)
	}
	return there
}

// Retain forgets all addresses that are not kept, and reports whether there were any.
func (b *TableBuilder) Retain(keep func(netip.Addr) bool) bool {
	n := 0
	for at := 0; at < len(b.records); at += recordSize {
		if keep(netip.AddrFrom16([16]byte(b.records[at : at+16])).Unmap()) {
			n += copy(b.records[n:], b.records[at:at+recordSize])
		} else {
			b.unused += b.size(at)
		}
	}
	gone := n < len(b.records)
	b.records = b.records[:n]
	return gone
}

// Build writes the table into a sealed memfd, which the caller closes.
func (b *TableBuilder) Build(version uint64) (int, error) {
	if b.unused > len(b.text)/2 {
		b.compact()
	}
	t := make([]byte, 0, tableHeader+len(b.records)+len(b.text))
	t = append(t, tableMagic...)
	t = binary.LittleEndian.AppendUint64(t, version)
	t = binary.LittleEndian.AppendUint32(t, uint32(b.Len()))
	t = binary.LittleEndian.AppendUint32(t, uint32(len(b.text)))
	return sealedCopy(append(append(t, b.records...), b.text...))
}

// compact leaves out what no record refers to.
func (b *TableBuilder) compact() {
	old := *b
	b.text, b.at, b.unused = nil, nil, 0
	for at := 0; at < len(b.records); at += recordSize {
		b.write(at, [16]byte(b.records[at:at+16]), old.string(at+16), old.string(at+22))
	}
}

func (b *TableBuilder) write(at int, key [16]byte, id, workload string) {
	r := append(b.records[at:at], key[:]...) // in its place: there is room
	r = binary.LittleEndian.AppendUint32(r, b.place(id))
	r = binary.LittleEndian.AppendUint16(r, uint16(len(id)))
	r = binary.LittleEndian.AppendUint32(r, b.place(workload))
	binary.LittleEndian.AppendUint16(r, uint16(len(workload)))
}

// place returns where a text is, which is there once.
func (b *TableBuilder) place(s string) uint32 {
	at, there := b.at[s]
	if !there {
		if b.at == nil {
			b.at = map[string]uint32{}
		}
		at = uint32(len(b.text))
		b.at[s] = at
		b.text = append(b.text, s...)
	}
	return at
}

// string is the text that a reference in the records is of.
func (b *TableBuilder) string(ref int) string {
	off, n := binary.LittleEndian.Uint32(b.records[ref:]), binary.LittleEndian.Uint16(b.records[ref+4:])
	return string(b.text[off : off+uint32(n)])
}

// size is what a record's texts have: others may have them, too.
func (b *TableBuilder) size(at int) int {
	return int(binary.LittleEndian.Uint16(b.records[at+20:])) + int(binary.LittleEndian.Uint16(b.records[at+26:]))
}
