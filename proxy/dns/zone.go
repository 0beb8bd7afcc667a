package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"assay.dev"
	"golang.org/x/net/dns/dnsmessage"
)

// ttl is short: names follow the snapshot within seconds.
const ttl = 5

// maxAnswers bounds the addresses of a headless service in one answer.
const maxAnswers = 512

// Services are those that names can mean; nil for none.
type Services interface {
	Service(key string) *assay.Service // by Service.Key
	Owner(vip netip.Addr) *assay.Service
}

// Snapshot is what names mean at one moment. It never changes.
type Snapshot struct {
	namespace string
	suffix    string // ".svc.DOMAIN", or ""
	services  Services
	upstreams []netip.AddrPort
}

// NewSnapshot is what names mean to a workload in namespace.
func NewSnapshot(namespace, domain string, services Services, upstreams []netip.AddrPort) *Snapshot {
	s := &Snapshot{namespace: namespace, services: services, upstreams: upstreams}
	if domain = strings.ToLower(strings.Trim(domain, ".")); domain != "" {
		s.suffix = ".svc." + domain
	}
	return s
}

// answer is what the snapshot says to a question.
type answer struct {
	ours    bool // otherwise it is for the upstreams
	rcode   dnsmessage.RCode
	records []dnsmessage.Resource
}

// lookup answers q, or says that it is not ours.
func (s *Snapshot) lookup(q dnsmessage.Question) answer {
	if q.Class != dnsmessage.ClassINET {
		return answer{}
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if a, ok := reverseAddr(name); ok {
		return s.reverse(q, a)
	}
	port, name := portLabels(name)
	svc, ours := s.find(name)
	if !ours {
		return answer{ours: s.beneath(name), rcode: dnsmessage.RCodeNameError}
	}
	if svc == nil {
		return answer{ours: true, rcode: dnsmessage.RCodeNameError}
	}
	if port != "" {
		return s.ports(q, svc, port)
	}
	out := answer{ours: true}
	for _, a := range addresses(svc) {
		if r, ok := addressRecord(q.Name, a); ok && (q.Type == r.Header.Type || q.Type == dnsmessage.TypeALL) {
			out.records = append(out.records, r)
		}
	}
	return out
}

// find returns the service that name means. ours with no service is a name that can
// only be ours but is nobody's.
func (s *Snapshot) find(name string) (svc *assay.Service, ours bool) {
	full := false
	if s.suffix != "" && strings.HasSuffix(name, s.suffix) {
		name, full = strings.TrimSuffix(name, s.suffix), true
	} else if s, ok := strings.CutSuffix(name, ".svc"); ok {
		name, full = s, true
	}
	label := strings.Split(name, ".")
	switch {
	case len(label) == 2:
		svc = s.services.Service(label[1] + "/" + label[0])
	case len(label) == 1 && !full:
		svc = s.services.Service(s.namespace + "/" + label[0])
	}
	return svc, full || svc != nil
}

// beneath reports whether name is one that programs ask for beside a service's, like
// _grpc_config.payments: nobody upstream can know it, and waiting for them would
// hold up the program.
func (s *Snapshot) beneath(name string) bool {
	for strings.HasPrefix(name, "_") {
		_, rest, _ := strings.Cut(name, ".")
		if svc, _ := s.find(rest); svc != nil {
			return true
		}
		name = rest
	}
	return false
}

// addresses are a service's own, or those of its ready endpoints.
func addresses(svc *assay.Service) []netip.Addr {
	if !svc.Headless {
		return svc.VIPs
	}
	var list []netip.Addr
	for _, e := range svc.Endpoints {
		if slices.ContainsFunc(e.Targets, func(t uint16) bool { return t != 0 }) && len(list) < maxAnswers {
			list = append(list, e.Addrs...)
		}
	}
	return list
}

func addressRecord(name dnsmessage.Name, a netip.Addr) (dnsmessage.Resource, bool) {
	a = a.Unmap()
	h := dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: ttl}
	switch {
	case a.Is4():
		h.Type = dnsmessage.TypeA
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}, true
	case a.Is6():
		h.Type = dnsmessage.TypeAAAA
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}}, true
	}
	return dnsmessage.Resource{}, false
}

// portLabels takes _PORT._tcp from the front of a name.
func portLabels(name string) (port, rest string) {
	first, tail, ok := strings.Cut(name, ".")
	if !ok || len(first) < 2 || first[0] != '_' {
		return "", name
	}
	rest, ok = strings.CutPrefix(tail, "_tcp.")
	if !ok {
		return "", name
	}
	return first[1:], rest
}

// ports answers for one named port of a service (RFC 2782).
func (s *Snapshot) ports(q dnsmessage.Question, svc *assay.Service, port string) answer {
	out := answer{ours: true, rcode: dnsmessage.RCodeNameError}
	for _, p := range svc.Ports {
		if p.Name != port && strconv.Itoa(int(p.Port)) != port {
			continue
		}
		out.rcode = dnsmessage.RCodeSuccess
		target, err := dnsmessage.NewName(s.fullName(svc))
		if err != nil || q.Type != dnsmessage.TypeSRV && q.Type != dnsmessage.TypeALL {
			continue
		}
		out.records = append(out.records, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypeSRV, Class: dnsmessage.ClassINET, TTL: ttl},
			Body:   &dnsmessage.SRVResource{Weight: 1, Port: p.Port, Target: target},
		})
	}
	return out
}

func (s *Snapshot) fullName(svc *assay.Service) string {
	suffix := s.suffix
	if suffix == "" {
		suffix = ".svc"
	}
	return svc.Name + "." + svc.Namespace + suffix + "."
}

// reverse answers for our virtual addresses; others are for the upstreams.
func (s *Snapshot) reverse(q dnsmessage.Question, a netip.Addr) answer {
	svc := s.services.Owner(a)
	if svc == nil {
		return answer{}
	}
	out := answer{ours: true}
	name, err := dnsmessage.NewName(s.fullName(svc))
	if err == nil && (q.Type == dnsmessage.TypePTR || q.Type == dnsmessage.TypeALL) {
		out.records = append(out.records, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET, TTL: ttl},
			Body:   &dnsmessage.PTRResource{PTR: name},
		})
	}
	return out
}

// reverseAddr reads a name under in-addr.arpa or ip6.arpa (RFC 1035 section 3.5, RFC
// 3596 section 2.5).
func reverseAddr(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		label := strings.Split(rest, ".")
		slices.Reverse(label)
		a, err := netip.ParseAddr(strings.Join(label, "."))
		return a, err == nil && a.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var raw [16]byte
	for i := range 32 {
		c := rest[2*i]
		if i < 31 && rest[2*i+1] != '.' {
			return netip.Addr{}, false
		}
		n, err := strconv.ParseUint(string(c), 16, 8)
		if err != nil {
			return netip.Addr{}, false
		}
		raw[15-i/2] |= byte(n) << (4 * (i % 2))
	}
	return netip.AddrFrom16(raw), true
}
