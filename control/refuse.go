package control

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// metaRefused is the certificates that were taken back.
const metaRefused = "control/refused-certificates"

// refusedCertificates are serial numbers and when each certificate ends by itself. The
// map is replaced, never changed. Hosts that joined with a token need none: they are removed
// as a whole, and none gets the ID of another. Nodes are named by people, so the next of a name
// would be the last one's. Workloads' certificates are answered for by their hosts.
type refusedCertificates struct {
	atomic.Pointer[map[string]time.Time]
}

func (r *refusedCertificates) list() map[string]time.Time {
	if m := r.Load(); m != nil {
		return *m
	}
	return nil
}

func (c *Control) loadRefused(ctx context.Context) error {
	c.refusing.Lock()
	defer c.refusing.Unlock()
	_, list, err := c.storedRefused(ctx)
	if err == nil && list != nil {
		c.refused.Store(&list)
	}
	return err
}

// storedRefused reads the list, as it is stored too; nil: there is none.
func (c *Control) storedRefused(ctx context.Context) (raw []byte, list map[string]time.Time, err error) {
	raw, err = c.store.GetMeta(ctx, metaRefused)
	if assay.KindOf(err) == assay.NotFound {
		return nil, nil, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &list)
	}
	return raw, list, err
}

// revoked refuses a certificate that was taken back, on every new connection; calls on
// old ones ask isRefused.
func (c *Control) revoked(cert *x509.Certificate) error {
	if c.isRefused(serialOf(cert)) {
		return errors.New("the certificate was taken back")
	}
	return nil
}

func (c *Control) isRefused(serial string) bool {
	_, refused := c.refused.list()[serial]
	return refused
}

func serialOf(cert *x509.Certificate) string { return fmt.Sprintf("%032x", cert.SerialNumber) }

// refuseCertificate takes an operator's certificate back, by its serial number.
func (c *Control) refuseCertificate(ctx context.Context, serial string) error {
	op := "delete certificate " + cut(serial, 64)
	cert, ok := c.model.certificate(serial)
	if !ok {
		return &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("there is no such certificate, or it has ended"), Remedy: "see assay get certificates"}
	}
	switch {
	case strings.Contains(cert.Subject, "/assay/"+string(operator)+"/"), strings.Contains(cert.Subject, "/assay/"+string(viewer)+"/"):
	case strings.Contains(cert.Subject, "/assay/"+string(hostRole)+"/"):
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("it is a host's"), Remedy: "remove the host: assay delete host " + cert.Host}
	default:
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("it is not an operator's"), Remedy: "end the workload, or remove its host"}
	}
	return c.refuseCertificates(ctx, c.storeFor(ctx, "certificate "+serial+" of "+cert.Subject), cert)
}

// refuseCertificates takes certificates back.
func (c *Control) refuseCertificates(ctx context.Context, db *store.DB, certs ...store.Certificate) error {
	c.refusing.Lock()
	defer c.refusing.Unlock()
	for {
		was, list, err := c.storedRefused(ctx)
		if err != nil {
			return err
		}
		if list == nil {
			list = map[string]time.Time{}
		}
		now := c.now()
		maps.DeleteFunc(list, func(_ string, ends time.Time) bool { return ends.Before(now) })
		for _, cert := range certs {
			list[cert.Serial] = cert.NotAfter
		}
		raw, err := json.Marshal(list)
		if err != nil {
			return err
		}
		swapped, err := db.CompareAndSetMeta(ctx, metaRefused, was, raw)
		if err != nil {
			return err
		}
		if swapped {
			c.refused.Store(&list)
			return nil
		}
	}
}

// certificatesOf returns the certificates of a subject that have not ended.
func (m *model) certificatesOf(subject string) []store.Certificate {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.certs[subject])
}

// certificate finds one that was issued and has not ended.
func (m *model) certificate(serial string) (store.Certificate, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, list := range m.certs {
		for _, cert := range list {
			if cert.Serial == serial {
				return cert, true
			}
		}
	}
	return store.Certificate{}, false
}
