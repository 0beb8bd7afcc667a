package route

import (
	"bytes"
	"strconv"

	"assay.dev"
)

// AppendLocation appends what a redirect's Location says in answer to a request that came
// to a service's port with scheme.
func AppendLocation(dst []byte, r *assay.Redirect, v *View, scheme string, port uint16) []byte {
	to := scheme
	if r.Scheme != "" {
		to = r.Scheme
	}
	dst = append(append(dst, to...), "://"...)
	if r.Host != "" {
		dst = append(dst, r.Host...)
	} else {
		dst = append(dst, hostOf(v.Authority)...)
	}
	switch {
	case r.Port != 0:
		port = r.Port
	case r.Scheme != "":
		port = wellKnown(to)
	}
	if port != wellKnown(to) {
		dst = strconv.AppendUint(append(dst, ':'), uint64(port), 10)
	}
	dst = AppendPath(dst, r.Path, v.path())
	if len(v.Query) > 0 {
		dst = append(append(dst, '?'), v.Query...)
	}
	return dst
}

func wellKnown(scheme string) uint16 {
	if scheme == "https" {
		return 443
	}
	return 80
}

// hostOf returns an authority without its port.
func hostOf(authority []byte) []byte {
	if len(authority) > 0 && authority[0] == '[' {
		if i := bytes.IndexByte(authority, ']'); i >= 0 {
			return authority[:i+1]
		}
	}
	if i := bytes.IndexByte(authority, ':'); i >= 0 {
		return authority[:i]
	}
	return authority
}
