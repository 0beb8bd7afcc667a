package proxy

import (
	"encoding/hex"

	"assay.dev"
	"assay.dev/proxy/route"
)

// forwardedCert is the field that tells an application of its client's certificate, as
// Envoy defines it.
const forwardedCert = "X-Forwarded-Client-Cert"

// stripForwardedCert lists it as clients may write it: many applications know fields
// by names in which '-' and '_' are the same.
var stripForwardedCert = func() (names []string) {
	for i := range 8 {
		name := []byte("x-forwarded-client-cert")
		for bit, at := range []int{1, 11, 18} {
			if i>>bit&1 != 0 {
				name[at] = '_'
			}
		}
		names = append(names, string(name))
	}
	return names
}()

// nobodysCert is for clients without one: whatever they say of it goes.
var nobodysCert = route.HeadEdit{Drop: stripForwardedCert}

// certEdit tells of the session's client, and of nobody else.
func (s *session) certEdit() *route.HeadEdit {
	switch {
	case s.certOfPeer != nil:
	case s.security != assay.MutualTLS:
		s.certOfPeer = &nobodysCert
	default:
		value := "By=" + s.p.snap.Load().Identity.String() + ";Hash=" + hex.EncodeToString(s.peer.Leaf[:]) + ";URI=" + s.peer.Identity.String()
		s.certOfPeer = &route.HeadEdit{Drop: stripForwardedCert, Append: []assay.HeaderField{{Name: forwardedCert, Value: value}}}
	}
	return s.certOfPeer
}
