package proxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

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
	name, err := o.serverName()
	if err != nil {
		return err
	}
	rule := o.names.Match(name)
	if rule == nil {
		return &refusal{refusedNoRule, fmt.Errorf("no TLSRoute of service %s has the name %q", o.port.service, name)}
	}
	about := func(format string, args ...any) error {
		return &refusal{refusedRule, fmt.Errorf("%s %s; see assay describe of it", rule.Route, fmt.Sprintf(format, args...))}
	}
	b := rule.Pick(rand.Uint64())
	switch {
	case b == nil:
		return about("has no backend with a weight over 0")
	case b.Invalid != "":
		return about("sends the connection to a backend that cannot be used: %s", b.Invalid)
	}
	return o.relayTo(b, about)
}

func (o *outbound) relayTo(b *route.Backend, about func(string, ...any) error) error {
	sp := o.snap.backend(b.Service, b.Port)
	if sp == nil {
		return about("sends the connection to %s:%d, which is not there any more", b.Service, b.Port)
	}
	o.target, o.byName = target{port: sp, set: sp.endpoints(o.dst.Addr())}, true
	if o.set.Len() == 0 {
		return &refusal{refusedNoEndpoint, errors.New("service " + b.Service + " has none")}
	}
	return o.relay()
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
