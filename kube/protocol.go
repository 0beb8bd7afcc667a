package kube

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"assay.dev"
)

// protocols is what the mesh knows of the names that appProtocol may have: IANA's
// service names (RFC 6335), Kubernetes' own (kubernetes.io/…), and those that
// service meshes have made customary.
var protocols = map[string]assay.Protocol{
	"http": assay.HTTP1, "http1": assay.HTTP1, "http-alt": assay.HTTP1, "ws": assay.HTTP1, "grpc-web": assay.HTTP1, "kubernetes.io/ws": assay.HTTP1,
	"http2": assay.HTTP2, "h2c": assay.HTTP2, "grpc": assay.HTTP2, "kubernetes.io/h2c": assay.HTTP2,
	"https": assay.TLS, "tls": assay.TLS, "ssl": assay.TLS, "wss": assay.TLS, "kubernetes.io/wss": assay.TLS,
	"ldaps": assay.TLS, "imaps": assay.TLS, "pop3s": assay.TLS, "submissions": assay.TLS, "amqps": assay.TLS, "secure-mqtt": assay.TLS, "ftps": assay.TLS,
	"tcp": assay.Opaque, "opaque": assay.Opaque,
	"mysql": assay.Opaque, "postgresql": assay.Opaque, "redis": assay.Opaque, "mongodb": assay.Opaque, "mongo": assay.Opaque, "ms-sql-s": assay.Opaque,
	"nats": assay.Opaque, "amqp": assay.Opaque, "mqtt": assay.Opaque, "kafka": assay.Opaque, "smtp": assay.Opaque, "submission": assay.Opaque,
	"imap": assay.Opaque, "pop3": assay.Opaque, "ftp": assay.Opaque, "ssh": assay.Opaque, "ldap": assay.Opaque, "memcache": assay.Opaque,
}

// Protocol returns what an appProtocol declares. A well-formed name that the mesh
// does not know declares nothing, so that detection decides: it may be HTTP under
// another name.
func Protocol(name string) (assay.Protocol, error) {
	if p, ok := protocols[strings.ToLower(name)]; ok {
		return p, nil
	}
	if msgs := validation.IsQualifiedName(name); len(msgs) > 0 {
		return assay.Detect, fmt.Errorf("%q is neither an IANA service name nor PREFIX/NAME: %s", name, withoutPattern(msgs[0]))
	}
	return assay.Detect, nil
}
