package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube/v1alpha1"
)

var egressType = reflect.TypeFor[v1alpha1.Egress]()

// maxEgress keeps an Egress readable.
const maxEgress = 128

// egress reads an assay.dev/v1alpha1 Egress.
func (d *document) egress() {
	var in struct {
		Spec v1alpha1.EgressSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	s := &in.Spec
	out := assay.EgressRule{Name: d.meta.Name}
	unique := func(field string, i int, value string, list []string) bool {
		if slices.Contains(list, value) {
			d.at(fmt.Sprintf("spec.%s[%d]", field, i), "%s is there already", value)
			return false
		}
		return true
	}
	for i, a := range s.Accounts {
		if !assay.ValidName(a) {
			d.at(fmt.Sprintf("spec.accounts[%d]", i), "%q may hold a-z, 0-9 and '-', 63 characters at most", a)
		} else if unique("accounts", i, a, out.Accounts) {
			out.Accounts = append(out.Accounts, a)
		}
	}
	for i, h := range s.Hosts {
		path := fmt.Sprintf("spec.hosts[%d]", i)
		host := strings.TrimSuffix(strings.ToLower(h), ".")
		switch {
		case !assay.ValidHost(host):
			d.at(path, "%q: want a DNS name, or *.DOMAIN of at least two labels; an address belongs into spec.addresses", h)
		case unique("hosts", i, host, out.Hosts):
			out.Hosts = append(out.Hosts, host)
		}
	}
	var addresses []string
	for i, a := range s.Addresses {
		p, err := netip.ParsePrefix(a)
		if addr, e := netip.ParseAddr(a); e == nil && addr.Zone() == "" {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		path := fmt.Sprintf("spec.addresses[%d]", i)
		switch {
		case err != nil || p.Addr().Is4In6():
			d.at(path, "%q: want an address or a prefix, for instance 192.0.2.0/24", a)
		case p.Masked() != p:
			d.at(path, "%q has bits beyond its length; want %s", a, p.Masked())
		case unique("addresses", i, p.String(), addresses):
			addresses = append(addresses, p.String())
			out.Addresses = append(out.Addresses, p)
		}
	}
	for i, p := range s.Ports {
		path := fmt.Sprintf("spec.ports[%d]", i)
		switch {
		case !validPort(p):
			d.missing(path, "want a number from 1 to 65535")
		case slices.Contains(out.Ports, uint16(p)):
			d.at(path, "%d is there already", p)
		default:
			out.Ports = append(out.Ports, uint16(p))
		}
	}
	if len(s.Ports) == 0 {
		d.missing("spec.ports", "at least one port is needed")
	}
	if len(s.Hosts)+len(s.Addresses) == 0 {
		d.missing("spec", "hosts or addresses are needed")
	}
	for field, n := range map[string]int{"accounts": len(s.Accounts), "hosts": len(s.Hosts), "addresses": len(s.Addresses), "ports": len(s.Ports)} {
		if n > maxEgress {
			d.at("spec."+field, "%d of them; %d are supported, in each of several Egress", n, maxEgress)
		}
	}
	kept := v1alpha1.EgressSpec{Accounts: out.Accounts, Hosts: out.Hosts, Addresses: addresses, Ports: s.Ports}
	d.intent.Egress = append(d.intent.Egress, discovery.DeclaredEgress{Namespace: d.namespace, EgressRule: out})
	d.keep(kept)
}
