package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

func podEnv(t *testing.T) map[string]string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		"ASSAY_CONTROL": "[10.96.0.7]:7400", "ASSAY_TRUST": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		"ASSAY_PROBES": "8080,9090", "ASSAY_PORTS": "", "POD_NAMESPACE": "bank", "POD_NAME": "web-0", "POD_UID": "0c5c9a5e-1111-2222-3333-444455556666",
		"POD_IPS": "10.244.0.7,fd00::7", "HOST_IPS": "192.0.2.1", "SERVICE_ACCOUNT": "web", "NODE_NAME": "one",
	}
}

// TestReadPod: a sidecar is told everything by its environment, and says what is wrong there.
func TestReadPod(t *testing.T) {
	good := podEnv(t)
	p, err := readPod(func(name string) string { return good[name] })
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(p.pod.Probes, []uint16{8080, 9090}) || len(p.pod.Ports) > 0 || len(p.pod.Addrs) != 2 || len(p.own.Addrs) != 1 || len(p.roots) != 1 || !strings.HasPrefix(p.own.Node, "node-") {
		t.Errorf("%+v", p)
	}
	for name, value := range map[string]string{
		"POD_UID": "", "POD_IPS": "", "ASSAY_TRUST": "", "ASSAY_CONTROL": "", "NODE_NAME": "",
		"HOST_IPS": "node", "ASSAY_PROBES": "8080,http", "ASSAY_PORTS": "0",
	} {
		bad := maps.Clone(good)
		bad[name] = value
		if _, err := readPod(func(name string) string { return bad[name] }); assay.KindOf(err) != assay.Invalid || !strings.Contains(err.Error(), name) {
			t.Errorf("%s=%q: %v", name, value, err)
		}
	}
}

// TestSidecarReady: who asks a sidecar that is not there is told so.
func TestSidecarReady(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "ready.sock")
	if err := sidecarReady(socket); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("nobody is there: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- sayReady(ctx, socket, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	deadline := time.Now().Add(time.Minute)
	for err := sidecarReady(socket); err != nil; err = sidecarReady(socket) {
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	stop()
	<-done
	if err := sidecarReady(socket); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("it has ended: %v", err)
	}
}
