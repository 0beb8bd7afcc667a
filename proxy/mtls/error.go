package mtls

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
)

// Reason sorts failures for the metric label `reason`. The set is fixed.
type Reason string

const (
	NoCertificate    Reason = "no-certificate"    // we have none yet, or the peer showed none
	Expired          Reason = "expired"           // some certificate of the chain
	NotYetValid      Reason = "not-yet-valid"     // likewise; often a wrong clock
	UnknownAuthority Reason = "unknown-authority" // no chain to our trust bundle, or another trust domain
	IdentityMismatch Reason = "identity-mismatch" // a valid workload, but not the one that was dialled
	BadALPN          Reason = "bad-alpn"          // the peer does not speak assay/1
	Malformed        Reason = "malformed"         // not an X.509-SVID of a workload, or not TLS as it should be
	Timeout          Reason = "timeout"           // the handshake, or our wait for a certificate, took too long
	PeerRefused      Reason = "peer-refused"      // the peer said no to us: its own log says why
	Disconnected     Reason = "disconnected"      // the connection ended in the handshake
)

var remedies = map[Reason]string{
	NoCertificate:    "see `assay get certificates` on both hosts: a workload without a certificate was refused one, or waits for its agent",
	Expired:          "see `assay check`: renewal stopped, most often because the agent or control cannot be reached",
	NotYetValid:      "compare the clocks of both hosts with control's",
	UnknownAuthority: "compare the bundle versions in `assay get certificates`: one side has not taken over a root, or the peer belongs to another mesh",
	IdentityMismatch: "the address belongs to another workload than the table says: the table is stale, or somebody else answers there",
	BadALPN:          "the peer is not an Assay proxy, or one of an incompatible release",
	Malformed:        "the certificate was not issued by Assay for a workload",
	Timeout:          "the peer's proxy does not answer: look at its host's load and at the network in between",
	PeerRefused:      "read the reason in the peer's log or in its handshake failures (`assay stat`)",
	Disconnected:     "the peer's proxy stopped, or something in between cut the connection",
}

// Error is a failed handshake or an unusable certificate.
type Error struct {
	Reason Reason
	Peer   string // SPIFFE ID or serial of the certificate at fault, when there is one
	Err    error
}

func (e *Error) Error() string {
	s := "mtls: " + string(e.Reason)
	if e.Peer != "" {
		s += ": " + e.Peer
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Remedy says what to do about it.
func (e *Error) Remedy() string { return remedies[e.Reason] }

// ReasonOf sorts any error of a handshake, or of the first read after it: with TLS
// 1.3 a client learns only then that the server refused its certificate. It returns
// "" for nil.
func ReasonOf(err error) Reason {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return Timeout
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" { // a TLS alert
		if strings.Contains(e.Err.Error(), "no application protocol") {
			return BadALPN
		}
		return PeerRefused
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return Malformed
	}
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE, context.Canceled} {
		if errors.Is(err, gone) {
			return Disconnected
		}
	}
	text := err.Error()
	switch {
	case strings.Contains(text, "didn't provide a certificate"):
		return NoCertificate
	case strings.Contains(text, "unsupported application protocols"):
		return BadALPN
	}
	return Malformed
}

// wrap makes an *Error of whatever a handshake returned.
func wrap(err error) error {
	if _, ok := errors.AsType[*Error](err); ok || err == nil {
		return err
	}
	return &Error{Reason: ReasonOf(err), Err: err}
}
