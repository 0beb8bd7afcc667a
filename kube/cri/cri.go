package cri

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"assay.dev"
)

// Runtime is one node's container runtime. It is safe for concurrent use.
type Runtime struct {
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
	content contentapi.ContentClient

	mu       sync.Mutex
	known    map[string]Image   // by the runtime's ID; content never changes
	networks map[string]network // by the sandbox's ID; it has one for its whole life
}

// network is what a sandbox's network is known by.
type network struct {
	process int
	path    string
	addrs   []netip.Addr
}

// Image is what a container was made of.
type Image struct {
	Name string // as the pod names it, or one of its tags, for people
	// Config is the configuration's digest, which runtimes call the image's ID.
	Config assay.Digest
	// Manifest is what this platform runs; "" when the store does not have it.
	Manifest assay.Digest
	// Index is what contains the manifest, when the image was named by an index.
	Index   assay.Digest
	Unknown string // why there is no manifest
}

// Container is the newest one of its name.
type Container struct {
	Name  string
	Image Image
	// Created is when, Running whether it runs. An init container that has ended was in the
	// pod, too.
	Created time.Time
	Running bool
}

// Sandbox is a pod that the runtime holds.
type Sandbox struct {
	ID        string
	UID       string // of the pod
	Namespace string
	Name      string
	Created   time.Time
	// Process is in the pod's network namespace, NetNS a path of that; each may be missing.
	Process    int
	NetNS      string
	Addrs      []netip.Addr // of its own; none when it shares the node's network
	Containers []Container  // by name
}

// Path leads to the pod's network namespace, "" when the runtime tells none.
func (s *Sandbox) Path() string {
	if s.NetNS == "" && s.Process > 0 {
		return fmt.Sprintf("/proc/%d/ns/net", s.Process)
	}
	return s.NetNS
}

// Artifacts are what the pod runs, init, sidecar and ephemeral containers included, each with
// what its manifest contains and what contains it.
func (s *Sandbox) Artifacts() assay.ArtifactSet {
	var set assay.ArtifactSet
	for _, c := range s.Containers {
		a := assay.Artifact{Kind: assay.Image, Name: c.Image.Name, Digest: c.Image.Manifest, Config: c.Image.Config, Index: c.Image.Index}
		if a.Digest == "" {
			a.Digest, a.Unproven = c.Image.Config, c.Image.Unknown
		}
		if !slices.Contains(set, a) {
			set = append(set, a)
		}
	}
	return set
}

// Open returns the runtime behind a socket. It does not connect yet.
func Open(socket string) (*Runtime, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "reach the container runtime at " + socket, Err: err}
	}
	return &Runtime{
		conn: conn, runtime: runtimeapi.NewRuntimeServiceClient(conn), images: runtimeapi.NewImageServiceClient(conn),
		content: contentapi.NewContentClient(conn), known: map[string]Image{}, networks: map[string]network{},
	}, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.conn.Close() }

// Sandboxes lists the pods that have a network, each with its containers. One that ends
// meanwhile is left out.
func (r *Runtime) Sandboxes(ctx context.Context) ([]Sandbox, error) {
	pods, err := r.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}},
	})
	if err != nil {
		return nil, r.failed("list the pods", err)
	}
	containers, err := r.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, r.failed("list the containers", err)
	}
	of := map[string][]*runtimeapi.Container{}
	for _, c := range containers.GetContainers() {
		of[c.GetPodSandboxId()] = append(of[c.GetPodSandboxId()], c)
	}
	var list []Sandbox
	used := map[string]bool{}
	for _, p := range pods.GetItems() {
		s := Sandbox{
			ID: p.GetId(), UID: p.GetMetadata().GetUid(), Namespace: p.GetMetadata().GetNamespace(), Name: p.GetMetadata().GetName(),
			Created: time.Unix(0, p.GetCreatedAt()),
		}
		if err := r.network(ctx, &s); isGone(err) {
			continue
		} else if err != nil {
			return nil, err
		}
		for _, c := range newest(of[s.ID]) {
			id := c.GetImageRef()
			img, err := r.image(ctx, id)
			if err != nil {
				return nil, err
			}
			used[id] = true
			if said := c.GetImage().GetUserSpecifiedImage(); said != "" {
				img.Name = said // as newer runtimes keep it
			}
			s.Containers = append(s.Containers, Container{
				Name: c.GetMetadata().GetName(), Image: img, Created: time.Unix(0, c.GetCreatedAt()),
				Running: c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING,
			})
		}
		list = append(list, s)
	}
	r.forgetOthers(used, list)
	slices.SortFunc(list, func(a, b Sandbox) int { return cmp.Compare(a.ID, b.ID) })
	return list, nil
}

// newest returns the last attempt of each container, by name.
func newest(list []*runtimeapi.Container) []*runtimeapi.Container {
	last := map[string]*runtimeapi.Container{}
	for _, c := range list {
		name := c.GetMetadata().GetName()
		if old := last[name]; old == nil || old.GetCreatedAt() < c.GetCreatedAt() {
			last[name] = c
		}
	}
	var out []*runtimeapi.Container
	for _, c := range last {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *runtimeapi.Container) int {
		return cmp.Compare(a.GetMetadata().GetName(), b.GetMetadata().GetName())
	})
	return out
}

// network finds a sandbox's network namespace in what the runtime tells beside the
// interface: containerd and CRI-O have both of these fields.
func (r *Runtime) network(ctx context.Context, s *Sandbox) error {
	r.mu.Lock()
	n, ok := r.networks[s.ID]
	r.mu.Unlock()
	if ok {
		s.Process, s.NetNS, s.Addrs = n.process, n.path, n.addrs
		return nil
	}
	answer, err := r.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.ID, Verbose: true})
	if err != nil {
		return r.failed("look at pod "+s.Namespace+"/"+s.Name, err)
	}
	var info struct {
		PID     int `json:"pid"`
		Runtime struct {
			Linux struct {
				Namespaces []struct{ Type, Path string } `json:"namespaces"`
			} `json:"linux"`
		} `json:"runtimeSpec"`
	}
	said := answer.GetStatus().GetNetwork()
	for _, ip := range append([]*runtimeapi.PodIP{{Ip: said.GetIp()}}, said.GetAdditionalIps()...) {
		if a, err := netip.ParseAddr(ip.GetIp()); err == nil {
			s.Addrs = append(s.Addrs, a.Unmap())
		}
	}
	if err := json.Unmarshal([]byte(answer.GetInfo()["info"]), &info); err != nil {
		return nil // it is another runtime's, which says nothing
	}
	s.Process = info.PID
	for _, n := range info.Runtime.Linux.Namespaces {
		if n.Type == "network" {
			s.NetNS = n.Path
		}
	}
	if s.Path() != "" && len(s.Addrs) > 0 {
		r.mu.Lock()
		r.networks[s.ID] = network{s.Process, s.NetNS, s.Addrs}
		r.mu.Unlock()
	}
	return nil
}

// Events calls wake for whatever happens to a container, until the runtime ends, tells
// that it has no events, or ctx ends.
func (r *Runtime) Events(ctx context.Context, wake func()) error {
	stream, err := r.runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	for err == nil {
		if _, err = stream.Recv(); err == nil {
			wake()
		}
	}
	return r.failed("hear the events", err)
}

func (r *Runtime) failed(op string, err error) error {
	e := &assay.Error{Op: op + " of the container runtime at " + r.conn.Target(), Err: err}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		e.Kind, e.Remedy = assay.Unavailable, "see whether the runtime runs, and its CRI plugin with it"
	case codes.NotFound:
		e.Kind = assay.NotFound
	case codes.Unimplemented:
		e.Kind, e.Remedy = assay.Invalid, "a runtime with CRI v1 is needed (containerd 1.6, CRI-O 1.20 or newer)"
	case codes.PermissionDenied:
		e.Kind = assay.Denied
	}
	return e
}

func isGone(err error) bool {
	e, ok := errors.AsType[*assay.Error](err)
	return ok && status.Code(e.Err) == codes.NotFound
}

func (r *Runtime) forgetOthers(used map[string]bool, list []Sandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.known {
		if !used[id] {
			delete(r.known, id)
		}
	}
	for id := range r.networks {
		if !slices.ContainsFunc(list, func(s Sandbox) bool { return s.ID == id }) {
			delete(r.networks, id)
		}
	}
}

var errTooLarge = fmt.Errorf("it is larger than %d MiB", maxBlob>>20)
