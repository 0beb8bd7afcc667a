package assay

import "time"

// Balance says where everything belongs that passed a workload's link: the proxy, the
// exceptions that edges list, control traffic of the network, or nothing that anybody
// knows of. Numbers are of Ethernet frames, as the host's end of the link counts them,
// which the workload cannot reach; a pod's own end does, which CAP_NET_ADMIN in the pod can reset.
type Balance struct {
	Since time.Time  `json:"since"`
	In    BalanceWay `json:"in"`  // to the workload
	Out   BalanceWay `json:"out"` // from it
	// Problem is why the traffic beside the proxy is not counted, or not any more; the
	// numbers are then the last ones.
	Problem string `json:"problem,omitempty"`
}

// BalanceWay is one way. Link = Proxy + Exceptions + Control + Unexplained, in which the
// headers of fragments are neither here nor there.
type BalanceWay struct {
	Link       FrameCount `json:"link"`
	Proxy      FrameCount `json:"proxy"`
	Exceptions FrameCount `json:"exceptions"`
	// Control is what keeps the network going, by name: arp, icmp (errors and neighbour
	// discovery), igmp, ethernet, stranger (frames for somebody else), stray (TCP of no
	// connection).
	Control map[string]FrameCount `json:"control,omitempty"`
	// Unexplained are bytes that passed the link and that no rule counted. Negative:
	// counted, and dropped before the link.
	Unexplained int64 `json:"unexplained"`
}

// Adds reports whether the parts make the whole, fragments' headers left out.
func (w *BalanceWay) Adds() bool {
	sum := int64(w.Proxy.Bytes+w.Exceptions.Bytes) + w.Unexplained
	for _, c := range w.Control {
		sum += int64(c.Bytes)
	}
	return sum <= int64(w.Link.Bytes)
}

// FrameCount is a number of frames and of their bytes.
type FrameCount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Unbalanced reports whether a way has more unexplained bytes than noise makes: a few
// frames that the kernel dropped or passed while it was asked. TCP that belongs to no
// connection counts as unexplained when it is more than that.
func (w *BalanceWay) Unbalanced() bool {
	bound := int64(16<<10 + w.Link.Bytes/10_000)
	return w.Unexplained > bound || w.Control["stray"].Bytes > uint64(bound)*4
}
