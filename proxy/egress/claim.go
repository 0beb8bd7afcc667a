package egress

import (
	"bytes"
	"net/netip"
	"strings"

	"assay.dev"
	"assay.dev/proxy/detect"
)

// Claim is what a client's first bytes say.
type Claim struct {
	Protocol assay.Protocol
	Name     string // of the server, in lower case; "": they name nobody
	By       string // assay.BySNI or assay.ByHost when there is a name
}

// maxHead is how much of a request is searched for its host.
const maxHead = detect.MaxFirst

// Claimed reads the first bytes of a client. done is false while more of them could
// change the answer; claim is then what it is if none come.
func Claimed(p []byte) (claim Claim, done bool) {
	proto, done := detect.Client(p)
	claim.Protocol = proto
	switch {
	case !done:
		return claim, false
	case proto == assay.TLS:
		name, state := detect.ServerName(p)
		if state == detect.HelloMore {
			return claim, false
		}
		if n := host(name); n != "" {
			claim.Name, claim.By = n, assay.BySNI
		}
		return claim, true
	case proto == assay.HTTP1:
		name, done := requestHost(p)
		if n := host(string(name)); n != "" {
			claim.Name, claim.By = n, assay.ByHost
		}
		return claim, done
	}
	return claim, true
}

// requestHost finds the Host field of a request's head. A request to a forward proxy
// (CONNECT, or a target with a scheme) names somebody else than the server: none.
func requestHost(p []byte) (name []byte, done bool) {
	full := len(p) >= maxHead
	p = p[:min(len(p), maxHead)]
	line, rest, ok := bytes.Cut(p, []byte{'\n'})
	if !ok {
		return nil, full
	}
	method, target, _ := bytes.Cut(line, []byte{' '})
	if string(method) == "CONNECT" || len(target) == 0 || target[0] != '/' && target[0] != '*' {
		return nil, true
	}
	for {
		line, rest, ok = bytes.Cut(rest, []byte{'\n'})
		if !ok {
			return name, full
		}
		line = bytes.TrimSuffix(line, []byte{'\r'})
		if len(line) == 0 {
			return name, true
		}
		field, value, _ := bytes.Cut(line, []byte{':'})
		if !bytes.EqualFold(field, []byte("host")) {
			continue
		}
		if name != nil {
			return nil, true // two of them: whoever reads it may read either
		}
		name = bytes.TrimSpace(value)
		if len(name) == 0 {
			name = []byte{}
		}
	}
}

// host is a name without its port, in lower case; "" for what is no name: an address
// says no more than what was dialled.
func host(s string) string {
	if s == "" || s[0] == '[' {
		return ""
	}
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		s = s[:i]
	}
	s = strings.TrimSuffix(strings.ToLower(s), ".")
	if _, err := netip.ParseAddr(s); err == nil || !assay.ValidDNSName(s) {
		return ""
	}
	return s
}
