package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"assay.dev"
	"assay.dev/api"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// callerOfTransport returns who is at the other end, as its transport proved it.
func callerOfTransport(p *peer.Peer) (caller, bool) {
	switch info := p.AuthInfo.(type) {
	case caller:
		return info, true
	case credentials.TLSInfo:
		return callerOfCertificate(info.State.PeerCertificates)
	}
	return caller{}, false
}

// callerOfCertificate reads a certificate that verifyClient has verified.
func callerOfCertificate(chain []*x509.Certificate) (caller, bool) {
	if len(chain) == 0 || len(chain[0].URIs) != 1 {
		return caller{}, false
	}
	_, r, name, err := assay.ParseInfrastructure(chain[0].URIs[0])
	if err != nil {
		return caller{}, false
	}
	return caller{role: role(r), name: name, who: chain[0].URIs[0].String(), begins: chain[0].NotBefore, expires: chain[0].NotAfter, serial: serialOf(chain[0])}, true
}

// serverTLS is the TLS of remote hosts and operators. A client without a
// certificate may only join.
func (c *Control) serverTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert, // verified in VerifyConnection, on every connection
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if cert := c.certificate.Load(); cert != nil {
				return cert, nil
			}
			return nil, errors.New("control has no certificate yet")
		},
		VerifyConnection: c.verifyClient,
	}
}

// WebTLS is the TLS of a server of control's for those who know its roots and one of
// Config.Names, and have no certificate.
func (c *Control) WebTLS() *tls.Config {
	cfg := c.serverTLS()
	cfg.NextProtos, cfg.ClientAuth, cfg.VerifyConnection = []string{"h2", "http/1.1"}, tls.NoClientCert, nil
	return cfg
}

func (c *Control) verifyClient(st tls.ConnectionState) error {
	if len(st.PeerCertificates) == 0 {
		return nil
	}
	p, err := api.VerifyInfrastructure(st.PeerCertificates, c.authority.Pool(), c.now())
	if err != nil {
		return err
	}
	if p.TrustDomain != c.authority.TrustDomain() {
		return fmt.Errorf("%s is not of %s", p, c.authority.TrustDomain())
	}
	return c.revoked(st.PeerCertificates[0])
}

// unixPeer authenticates the other end of a unix socket by what the kernel knows
// of the process that connected (unix(7), SO_PEERCRED).
type unixPeer struct{ viewers int } // a group that may look; -1 for none

func (u unixPeer) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	sock, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("operator socket: a %T", conn)
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var groups []uint32
	var inner error
	if err := raw.Control(func(fd uintptr) {
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner == nil {
			groups, inner = peerGroups(int(fd))
		}
	}); err != nil || inner != nil {
		return nil, nil, errors.Join(err, inner)
	}
	who := caller{role: anonymous, name: fmt.Sprint("uid-", cred.Uid), who: fmt.Sprintf("uid %d", cred.Uid)}
	switch {
	case cred.Uid == 0 || int(cred.Uid) == os.Geteuid():
		who.role = operator
	case u.viewers >= 0 && (int(cred.Gid) == u.viewers || slices.Contains(groups, uint32(u.viewers))):
		who.role = viewer
	}
	return conn, who, nil
}

// peerGroups returns the supplementary groups of the process that connected
// (SO_PEERGROUPS, Linux 4.13).
func peerGroups(fd int) ([]uint32, error) {
	list := make([]uint32, 64)
	for {
		size := uint32(len(list) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&list[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return list[:size/4], nil
		case errno == unix.ERANGE && len(list) < 1<<16:
			list = make([]uint32, size/4+1)
		default:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", errno)
		}
	}
}

func (u unixPeer) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("operator socket: these credentials are the server's")
}
func (u unixPeer) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}
func (u unixPeer) Clone() credentials.TransportCredentials { return u }
func (u unixPeer) OverrideServerName(string) error         { return nil }

// localPeer authenticates the host that runs in control's own process.
type localPeer struct{ host string }

func (l localPeer) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, caller{role: hostRole, name: l.host, who: "the host of control itself"}, nil
}
func (l localPeer) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, caller{}, nil
}
func (l localPeer) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local"}
}
func (l localPeer) Clone() credentials.TransportCredentials { return l }
func (l localPeer) OverrideServerName(string) error         { return nil }
