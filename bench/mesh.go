package main

import (
	"net/netip"
	"slices"

	"assay.dev/test/lab"
)

// newAssay is a real `assay up` with the backend and the client's host under
// `assay run`.
func newAssay(r *run, l *lab.Lab, res *results) *contender {
	m := l.StartMesh(r)
	server := m.Run(r, "bench-web", lab.Spec{Ports: []int{portHTTP1, portHTTP2, portEcho, portGRPC}, Command: backendCommand(r, l, "assay-backend")})
	client := m.Run(r, "bench-client", lab.Spec{})
	pair := func() []int { return []int{m.Proxy(server), m.Proxy(client)} }
	proxies := pair()
	if slices.Contains(proxies, 0) {
		r.Fatalf("assay: a workload has no proxy")
	}
	one := readMemory(proxies[1:])
	up := readMemory([]int{m.Up.PID})
	res.Mesh["upReadySeconds"] = m.ReadyTime.Seconds()
	res.Mesh["upIdleRSS"] = float64(up.RSS)
	res.Mesh["runSeconds"] = client.RunTime.Seconds()
	res.Mesh["proxyIdleRSS"] = float64(one.RSS)
	res.Mesh["proxyIdleAnonymous"] = float64(one.Anonymous)
	return &contender{
		name: "assay", client: client.Space, host: "bench-web", peer: server.IPv4.String(),
		addr: netip.AddrPortFrom(server.IPv4, 8081).String(),
		proxies: func() []int {
			// One that was replaced would take its CPU time with it.
			if now := pair(); !slices.Equal(now, proxies) {
				r.Fatalf("assay: proxies %v were replaced by %v\n%s", proxies, now, m.Up.Output())
			}
			return proxies
		},
	}
}
