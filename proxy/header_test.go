package proxy

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"assay.dev"
)

var headers = []Header{
	{Protocol: assay.HTTP1, Port: 80, ClientPort: 40001, Destination: netip.MustParseAddrPort("10.182.0.7:80"), Service: "bank/ledger"},
	{Protocol: assay.Opaque, Port: 5432, Destination: netip.MustParseAddrPort("[fd5a:5a59:1::7]:5432"), Service: strings.Repeat("a", 63) + "/" + strings.Repeat("b", 63)},
	{Protocol: assay.TLS, Port: 443, ClientPort: 1},
	{Protocol: assay.HTTP2, Port: 65535, ClientPort: 65535, Destination: netip.MustParseAddrPort("10.181.0.2:1")},
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range headers {
		wire := h.AppendTo(nil)
		if len(wire) > maxHeader {
			t.Errorf("%+v: %d bytes, maxHeader is %d", h, len(wire), maxHeader)
		}
		got, rest, err := ParseHeader(append(wire, "tail"...))
		if err != nil || got != h || string(rest) != "tail" {
			t.Errorf("%+v came back as %+v, %q, %v", h, got, rest, err)
		}
		for n := range wire {
			if _, _, err := ParseHeader(wire[:n]); err == nil {
				t.Errorf("%+v: %d of %d bytes are accepted", h, n, len(wire))
			}
		}
	}
}

func TestHeaderRefuses(t *testing.T) {
	good := headers[0].AppendTo(nil)
	for name, change := range map[string]func(b []byte){
		"version":           func(b []byte) { b[0] = 2 },
		"flag":              func(b []byte) { b[1] = 1 },
		"no protocol":       func(b []byte) { b[2] = 0 },
		"protocol":          func(b []byte) { b[2] = 5 },
		"port 0":            func(b []byte) { b[3], b[4] = 0, 0 },
		"family":            func(b []byte) { b[7] = 5 },
		"long key":          func(b []byte) { b[14] = 255 },
		"key with a quote":  func(b []byte) { b[15] = '"' },
		"key without slash": func(b []byte) { b[19] = 'x' },
	} {
		b := bytes.Clone(good)
		change(b)
		if h, _, err := ParseHeader(b); err == nil {
			t.Errorf("%s: accepted as %+v", name, h)
		}
	}
}

func FuzzHeader(f *testing.F) {
	for _, h := range headers {
		f.Add(h.AppendTo(nil))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		h, rest, err := ParseHeader(p)
		if err != nil {
			return
		}
		if wire := h.AppendTo(nil); !bytes.Equal(wire, p[:len(p)-len(rest)]) {
			t.Fatalf("%x was read as %+v, which is %x", p, h, wire)
		}
	})
}
