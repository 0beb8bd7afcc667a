package link

import (
	"fmt"
	"net/netip"

	"assay.dev"
)

// Patch changes the endpoints of a service that the proxy has been told of, and nothing else
// of it: one of a hundred pods that becomes ready is not worth telling of the others again.
type Patch struct {
	Service   string `json:"service"` // Service.Key
	Had       int    `json:"had"`     // endpoints, until now
	Endpoints []Run  `json:"endpoints"`
}

// Run is a part of a patched list: endpoints that were there, or new ones.
type Run struct {
	From int              `json:"from,omitempty"` // of those that were there
	Keep int              `json:"keep,omitempty"` // so many
	New  []assay.Endpoint `json:"new,omitempty"`
}

// NewPatch says how a service becomes another one. The second value is false when a patch
// cannot say it, or not with less than half of the endpoints.
func NewPatch(was, is *assay.Service) (Patch, bool) {
	if !was.EqualBut(is) {
		return Patch{}, false
	}
	type place struct {
		workload string
		addr     netip.Addr
	}
	of := func(e *assay.Endpoint) place {
		at := place{workload: e.Workload}
		if len(e.Addrs) > 0 {
			at.addr = e.Addrs[0]
		}
		return at
	}
	old := make(map[place]int, len(was.Endpoints))
	for i := range was.Endpoints {
		old[of(&was.Endpoints[i])] = i
	}
	p := Patch{Service: is.Key(), Had: len(was.Endpoints), Endpoints: []Run{}}
	news := 0
	for i := range is.Endpoints {
		e := &is.Endpoints[i]
		var last *Run
		if n := len(p.Endpoints); n > 0 {
			last = &p.Endpoints[n-1]
		}
		switch from, there := old[of(e)]; {
		case !there || !e.Equal(&was.Endpoints[from]):
			if news++; 2*news > len(is.Endpoints) {
				return Patch{}, false
			}
			if last == nil || last.Keep > 0 {
				p.Endpoints = append(p.Endpoints, Run{})
				last = &p.Endpoints[len(p.Endpoints)-1]
			}
			last.New = append(last.New, *e)
		case last != nil && last.Keep > 0 && last.From+last.Keep == from:
			last.Keep++
		default:
			p.Endpoints = append(p.Endpoints, Run{From: from, Keep: 1})
		}
	}
	return p, true
}

// Apply returns what was becomes by the patch. It fails when the patch was not made for it.
func (p *Patch) Apply(was *assay.Service) (assay.Service, error) {
	if was == nil || was.Key() != p.Service || len(was.Endpoints) != p.Had {
		return assay.Service{}, fmt.Errorf("link: a patch of service %s with %d endpoints, of which there is none", p.Service, p.Had)
	}
	is := *was
	is.Endpoints = make([]assay.Endpoint, 0, p.Had+1)
	for _, r := range p.Endpoints {
		if r.From < 0 || r.Keep < 0 || r.Keep > p.Had || r.From > p.Had-r.Keep || len(is.Endpoints) > maxPatched {
			return assay.Service{}, fmt.Errorf("link: a patch of service %s: %d endpoints from %d on, of %d", p.Service, r.Keep, r.From, p.Had)
		}
		is.Endpoints = append(append(is.Endpoints, was.Endpoints[r.From:r.From+r.Keep]...), r.New...)
	}
	return is, nil
}

// maxPatched bounds the endpoints of a patched service.
const maxPatched = 1 << 20
