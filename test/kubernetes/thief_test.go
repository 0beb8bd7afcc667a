package kubernetes_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/test/kubernetes"
)

func request(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// thief is who has an agent's token, and says what it likes.
type thief struct {
	id    string
	hosts api.HostsClient

	mu       sync.Mutex
	answers  map[string]string // by workload: "" accepted, else why not
	stream   api.Hosts_SyncClient
	finished error
}

func (r *controlling) join(t *testing.T, token string) (*thief, error) {
	t.Helper()
	key, csr := request(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	answer, err := r.dial(t, tls.Certificate{}).Join(ctx, &api.JoinRequest{Token: token, Csr: csr, HostName: "whatever"})
	if err != nil {
		return nil, api.StatusError("join", err)
	}
	return &thief{id: answer.HostId, answers: map[string]string{}, hosts: r.dial(t, tls.Certificate{Certificate: answer.Chain, PrivateKey: key})}, nil
}

// speak opens a stream.
func (h *thief) speak(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := h.hosts.Sync(ctx)
	if err == nil {
		err = stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	h.stream = stream
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			u, err := stream.Recv()
			h.mu.Lock()
			if err != nil {
				h.finished = err
				h.mu.Unlock()
				return
			}
			if a := u.GetAccepted(); a != nil {
				h.answers[a.WorkloadId] = ""
			} else if r := u.GetRefused(); r != nil {
				h.answers[r.WorkloadId] = r.Reason
			}
			h.mu.Unlock()
		}
	})
	t.Cleanup(func() { cancel(); reading.Wait() })
}

// say reports a pod and returns what control answers.
func (h *thief) say(t *testing.T, c *kubernetes.Cluster, p realPod, change func(w *assay.Workload)) string {
	t.Helper()
	w := &assay.Workload{ID: p.uid, Namespace: p.namespace, Name: p.account, Host: h.id, Addrs: p.addrs, MeshedSince: time.Now(),
		Identity: assay.Identity{TrustDomain: "cluster.test", Namespace: p.namespace, Account: p.account}}
	if change != nil {
		change(w)
	}
	h.mu.Lock()
	delete(h.answers, w.ID)
	h.mu.Unlock()
	if err := h.stream.Send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: api.FromWorkload(w)}}); err != nil {
		t.Fatal(err)
	}
	var answer string
	c.Eventually(t, "control answers about "+w.ID, func() error {
		h.mu.Lock()
		defer h.mu.Unlock()
		said, ok := h.answers[w.ID]
		if !ok {
			return fmt.Errorf("nothing; the stream: %v", h.finished)
		}
		answer = said
		return nil
	})
	return answer
}

// issue asks for a certificate and returns whom it names.
func (h *thief) issue(t *testing.T, uid string) (string, error) {
	t.Helper()
	_, csr := request(t)
	set := assay.ArtifactSet{{Kind: assay.Executable, Name: "/bin/echo", Digest: assay.DigestOf([]byte("echo"))}}
	resp, err := h.hosts.Issue(t.Context(), &api.IssueRequest{WorkloadId: uid, Csr: csr, Artifacts: api.FromArtifacts(set)})
	if err != nil {
		return "", api.StatusError("issue", err)
	}
	if resp.Refused != "" {
		return "", errors.New(resp.Refused)
	}
	leaf, err := x509.ParseCertificate(resp.Chain[0])
	if err != nil {
		return "", err
	}
	return leaf.URIs[0].String(), nil
}

// realPod is a pod as the API server has it.
type realPod struct {
	uid, namespace, name, account, node string
	addrs                               []netip.Addr
}

func podsOf(t *testing.T, c *kubernetes.Cluster, namespace, selector string) map[string]realPod {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name, Namespace, UID, DeletionTimestamp string }
			Spec     struct{ NodeName, ServiceAccountName string }
			Status   struct {
				PodIPs []struct{ IP string }
			}
		}
	}
	c.Get(t, "/api/v1/namespaces/"+namespace+"/pods?labelSelector="+selector, &list)
	pods := map[string]realPod{}
	for _, i := range list.Items {
		if i.Metadata.DeletionTimestamp != "" {
			continue
		}
		p := realPod{uid: i.Metadata.UID, namespace: i.Metadata.Namespace, name: i.Metadata.Name, account: i.Spec.ServiceAccountName, node: i.Spec.NodeName}
		for _, ip := range i.Status.PodIPs {
			p.addrs = append(p.addrs, netip.MustParseAddr(ip.IP))
		}
		slices.SortFunc(p.addrs, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
		pods[p.node] = p
	}
	return pods
}
