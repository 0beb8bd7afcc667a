package main

import (
	"fmt"

	"assay.dev/test/lab"
)

// newAssay is a real `assay up` with the backend and the client's host under
// `assay run`.
func newAssay(r *run, l *lab.Lab, res *results) *contender {
	m := l.StartMesh(r)
	server := m.Run(r, "bench-web", lab.Spec{Ports: []int{8081}, Command: backendCommand(r, l, "assay-backend")})
	client := m.Run(r, "bench-client", lab.Spec{})
	proxies := []int{m.Proxy(server), m.Proxy(client)}
	if proxies[0] == 0 || proxies[1] == 0 {
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
		name: "assay", client: client.Space, url: fmt.Sprintf("http://%s:8081", "bench-web"), peer: server.IPv4.String(),
		proxies: func() []int { return proxies },
	}
}
