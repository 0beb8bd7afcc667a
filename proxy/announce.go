package proxy

import (
	"encoding/binary"
	"net"
	"net/netip"

	"assay.dev"
)

// announce tells an application who its client is, where its service wants that: with
// a PROXY protocol header of version 2 before the first byte. Whatever the client
// sends comes after it, so that nobody can announce somebody else.
func (s *snapshot) announce(app *net.TCPConn, client, target netip.AddrPort, peer assay.Identity, security assay.Security) error {
	if !s.announced(target) {
		return nil
	}
	// The families of both are those of the connection that was made: the application
	// may listen on one only.
	from := netip.AddrPortFrom(addrPort(app.LocalAddr()).Addr(), client.Port())
	_, err := app.Write(appendProxyV2(nil, from, addrPort(app.RemoteAddr()), peer, security))
	return err
}

const (
	proxyV2Signature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyV2Proxy     = 0x21 // version 2, command PROXY
	proxyV2TCP4      = 0x11
	proxyV2TCP6      = 0x21
	// Types of what follows the addresses.
	proxyV2SSL        = 0x20
	proxyV2SSLVersion = 0x21
	// proxyV2Identity is in the range for applications' own use (0xE0 to 0xEF): the
	// client's SPIFFE ID.
	proxyV2Identity = 0xe0
	// What proxyV2SSL says of the client: it came over TLS, and showed a certificate.
	proxyV2ClientTLS = 0x01 | 0x02 | 0x04
)

// appendProxyV2 writes a header as the PROXY protocol's specification (HAProxy,
// section 2.2) has it.
func appendProxyV2(dst []byte, from, to netip.AddrPort, peer assay.Identity, security assay.Security) []byte {
	dst = append(dst, proxyV2Signature...)
	family := byte(proxyV2TCP4)
	if from.Addr().Is6() {
		family = proxyV2TCP6
	}
	dst = append(dst, proxyV2Proxy, family, 0, 0)
	start := len(dst)
	dst = append(append(dst, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	dst = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(dst, from.Port()), to.Port())
	if security == assay.MutualTLS {
		version := "TLSv1.3"
		dst = append(dst, proxyV2SSL, 0, byte(1+4+3+len(version)), proxyV2ClientTLS, 0, 0, 0, 0 /* verified */, proxyV2SSLVersion, 0, byte(len(version)))
		dst = append(dst, version...)
	}
	if !peer.IsZero() {
		id := peer.String()
		dst = append(dst, proxyV2Identity, byte(len(id)>>8), byte(len(id)))
		dst = append(dst, id...)
	}
	binary.BigEndian.PutUint16(dst[start-2:], uint16(len(dst)-start))
	return dst
}
