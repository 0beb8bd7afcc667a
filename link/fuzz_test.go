package link

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"

	"assay.dev"
	"golang.org/x/sys/unix"
)

// FuzzReceive gives one end what a peer may send that was taken over: a packet, a body
// beside it, and descriptors. Whatever comes is refused, or is read as every kind of
// message, and no descriptor is left.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"kind":"hello","body":{"pid":1,"listeners":["outbound"]}}`), []byte{}, uint8(0))
	f.Add([]byte(`{"kind":"report","id":3,"body":{"signals":[{"direction":"inbound","peer":"spiffe://td/ns/a/sa/b"}]}}`), []byte{}, uint8(1))
	f.Add([]byte(`{"kind":"report","id":3,"large":true}`), []byte(`{"signals":[{"direction":"outbound","protocol":"http1"}]}`), uint8(0))
	f.Add([]byte(`{"kind":"services","large":true}`), []byte(`{"full":true,"upsert":[{"namespace":"a","name":"b","vips":["10.182.0.1"]}]}`), uint8(2))
	f.Add([]byte(`{"kind":"certificate","id":18446744073709551615,"body":{"chain":["AAAA"],"refused":"no"}}`), []byte{}, uint8(0))
	f.Add([]byte(`{"kind":"table","body":{"version":1}}`), []byte(tableMagic), uint8(maxFiles+1))
	f.Add([]byte(`{"kind":"hello","body":`), []byte{}, uint8(0))
	f.Fuzz(func(t *testing.T, packet, large []byte, files uint8) {
		if len(packet) == 0 || len(packet) > MaxInline || len(large) > 1<<16 {
			t.Skip()
		}
		near, far := pair(t)
		defer near.Close()
		defer far.Close()
		far.Limit(1 << 15)
		var fds []int
		defer func() { closeAll(fds) }()
		for range int(files) % (maxFiles + 2) {
			fd, err := sealedCopy(nil)
			if err != nil {
				t.Skip(err)
			}
			fds = append(fds, fd)
		}
		if len(large) > 0 {
			fd, err := sealedCopy(large)
			if err != nil {
				t.Skip(err)
			}
			fds = append(fds, fd)
		}
		before := openDescriptors()
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		if _, _, err := near.Socket().WriteMsgUnix(packet, rights, nil); err != nil {
			t.Fatal(err)
		}
		m, err := far.Receive()
		if err == nil {
			if len(m.Body) > 0 && !json.Valid(m.Body) && !bytes.Equal(m.Body, large) {
				t.Errorf("a body that is neither JSON nor what was sent beside the packet: %q", m.Body)
			}
			for _, v := range []any{
				&Configure{}, &Services{}, &Table{}, &Bundle{}, &CSR{}, &Certificate{}, &Drain{}, &Hello{}, &Ack{}, &Report{}, &assay.Finding{},
			} {
				if m.Decode(v) != nil {
					continue
				}
				again, err := json.Marshal(v)
				if err != nil {
					t.Errorf("%T was read from %q and cannot be written: %v", v, m.Body, err)
				} else if err := json.Unmarshal(again, v); err != nil {
					t.Errorf("%T was written as %q and cannot be read: %v", v, again, err)
				}
			}
		} else if err == io.EOF {
			t.Errorf("a packet was taken for the end")
		}
		m.Discard()
		if after := openDescriptors(); after != before {
			t.Errorf("%d descriptors are open, %d before", after, before)
		}
	})
}

// openDescriptors counts those of the process.
func openDescriptors() int {
	n := 0
	for fd := range 256 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			n++
		}
	}
	return n
}
