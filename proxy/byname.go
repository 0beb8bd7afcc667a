package proxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"assay.dev"
	"assay.dev/proxy/detect"
	"assay.dev/proxy/route"
)

// helloWithin bounds how long a client of TLS may take for its first message, where its
// name decides.
const helloWithin = 10 * time.Second

// relayByName carries a connection of TLS, which stays closed, to the backend of the name
// that the client asks for. Where names decide, a connection that asks for none that a
// rule has goes nowhere.
func (o *outbound) relayByName() error {
	n, err := o.named()
	if err != nil {
		return err
	}
	return o.relayTo(n)
}

// named is what rules say of a connection: where it goes, and by which of them.
type named struct {
	rule    *route.Rule
	backend *route.Backend
	port    *servicePort // the backend's
}

// about refuses what the rule asks for.
func (n *named) about(format string, args ...any) error {
	return &refusal{refusedRule, fmt.Errorf("%s %s; see assay describe of it", n.rule.Route, fmt.Sprintf(format, args...))}
}

// named follows the rule of the name that the client asks for.
func (o *outbound) named() (*named, error) {
	name, err := o.serverName()
	if err != nil {
		return nil, err
	}
	n := &named{rule: o.names.Match(name)}
	if n.rule == nil {
		return nil, &refusal{refusedNoRule, fmt.Errorf("no TLSRoute of service %s has the name %q", o.port.service, name)}
	}
	n.backend = n.rule.Pick(rand.Uint64())
	switch b := n.backend; {
	case b == nil:
		return nil, n.about("has no backend with a weight over 0")
	case b.Invalid != "":
		return nil, n.about("sends the connection to a backend that cannot be used: %s", b.Invalid)
	}
	b := n.backend
	if n.port = o.snap.backend(b.Service, b.Port); n.port == nil {
		return nil, n.about("sends the connection to %s:%d, which is not there any more", b.Service, b.Port)
	}
	return n, nil
}

func (o *outbound) relayTo(n *named) error {
	o.target, o.byName = target{port: n.port, set: n.port.endpoints(o.dst.Addr())}, true
	if o.set.Len() == 0 {
		return &refusal{refusedNoEndpoint, errors.New("service " + n.backend.Service + " has none")}
	}
	return o.relay()
}

// byName follows the names' rules for a client from outside the mesh, as guests does those
// for requests. It reports whether the connection has been carried, or refused, because it
// was not for the application here.
func (i *inbound) byName() (done bool, err error) {
	if i.snap.namesOf(i.snap.sole(i.dst)) == nil {
		return false, nil
	}
	o := i.asOutbound(assay.TLS)
	o.raw = i.raw
	if o.route() != nil || o.names == nil {
		return false, nil
	}
	n, err := o.named()
	if err != nil {
		return true, err
	}
	if n.port.at(o.dst) != nil {
		return false, nil
	}
	if i.app != nil { // dialled while the client was silent
		i.app.Close()
		i.app = nil
	}
	return true, o.relayTo(n)
}

// serverName reads the client's first message, and leaves it where it is.
func (o *outbound) serverName() (string, error) {
	sn := newSniffer(o.conn, o.raw)
	defer sn.free()
	o.conn.SetReadDeadline(o.accepted.Add(helloWithin))
	defer clearWake(o.conn)
	for {
		name, state := detect.ServerName(sn.bytes())
		switch {
		case state == detect.HelloNone:
			return "", &refusal{refusedNotTLS, errors.New("the first message is no ClientHello")}
		case state != detect.HelloMore:
			return name, nil
		case sn.end:
			return "", &refusal{} // it went away
		case sn.buf != nil && sn.n == len(sn.buf):
			return "", &refusal{refusedNotTLS, fmt.Errorf("the first message has over %d bytes", sn.n)}
		}
		if err := sn.more(); isTimeout(err) {
			return "", &refusal{refusedSilent, errors.New("the first message did not come whole")}
		} else if err != nil {
			return "", &refusal{err: err}
		}
	}
}
