// Package mtls gives a proxy its live identity and the TLS 1.3 configurations that
// prove it and check the peer's.
//
// It refuses to decide with anything but the peer's certificate: server names,
// addresses and tickets mean nothing here. Everything is checked in
// VerifyConnection, which crypto/tls calls for every handshake, and sessions are
// never resumed, so that no handshake skips a check.
//
// Invariants:
//   - A private key is made here, lives in this process's memory and is never written,
//     returned or logged.
//   - A configuration is built once and follows renewals and new bundles by itself;
//     each handshake sees one certificate and one bundle.
//   - TLS 1.3, ALPN exactly "assay/1", a certificate on both sides, no tickets, no
//     early data. Key exchange is Go's default (X25519MLKEM768 among them).
//   - A peer is a workload of our trust domain. Infrastructure certificates (hosts,
//     control, operators) chain to the same roots and are refused.
//
// It starts no goroutine. All methods may be called by any goroutine.
//
// Tour: identity.go (the holder: keys, requests, certificates, bundles), config.go
// (the two configurations and Handshake), verify.go (what makes a peer acceptable),
// error.go (reasons and remedies).
package mtls
