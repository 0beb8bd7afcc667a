package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"assay.dev"
	"assay.dev/control"
	"assay.dev/identity"
	"assay.dev/kube"
)

// controlFlags are what `assay control` takes.
type controlFlags struct {
	data, listen, config, store, trustDomain, socket, viewers string
	lease, leafLife                                           time.Duration
	kubernetes                                                bool
	kubeconfig, namespace                                     string
	authorityKey, authoritySecret, advertise                  string
	keepCertificates                                          string
	injector                                                  injectorFlags
}

// controlCommand runs control alone, for the hosts of a mesh.
func controlCommand() *cobra.Command {
	var f controlFlags
	c := &cobra.Command{
		Use:   "control",
		Short: "Run the control of a mesh: identity, discovery, intent",
		Long: `Control keeps what is declared and what runs, serves it to the agents of all hosts,
and signs their workloads' certificates. Hosts join with a token (assay token create).

With --kubernetes its hosts are the nodes of a cluster: their agents join with the tokens of
their service account, services and pods are those of the API server, and people declare
routes and the rest there.

With --authority-key its authority is in the store too, sealed under that key. Of those that
have the same key and the same PostgreSQL store any number serve at the same time: hosts go to
any of them, and to another when one dies.

It stops at SIGTERM; connections of workloads do not need it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runControl(cmd.Context(), f, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
		},
	}
	flags := c.Flags()
	flags.StringVar(&f.data, "data", defaultData(), "folder for the authority's keys and the embedded store")
	flags.StringVar(&f.listen, "listen", ":7400", "address on which hosts and remote operators are served")
	flags.StringVar(&f.config, "config", "", "folder of intent that is watched and applied as a whole")
	flags.StringVar(&f.store, "store", "", "store: sqlite:PATH or postgres://… (default: state.db in --data)")
	flags.StringVar(&f.trustDomain, "trust-domain", "", "trust domain of a new mesh (default: assay.local)")
	flags.StringVar(&f.socket, "socket", defaultSocket(), "unix socket for the operators of this machine")
	flags.StringVar(&f.viewers, "viewers", "", "group whose members may look through --socket")
	flags.BoolVar(&f.kubernetes, "kubernetes", false, "be the control of a Kubernetes cluster")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach its API server (default: as the pod that this runs in)")
	flags.StringVar(&f.namespace, "namespace", cmp.Or(os.Getenv("POD_NAMESPACE"), "assay-system"), "the mesh's own namespace there, with the agents' service account (default: $POD_NAMESPACE, or assay-system)")
	flags.StringVar(&f.authorityKey, "authority-key", "", "file with the key under which the authority is sealed in the store (default: its keys are in --data)")
	flags.StringVar(&f.authoritySecret, "authority-secret", "", "with --kubernetes: Secret with that key, in --namespace; an empty one is filled")
	flags.StringVar(&f.advertise, "advertise", "", "HOST:PORT where other controls on the store reach this one")
	f.injector.flags(c)
	c.MarkFlagsMutuallyExclusive("kubernetes", "config")
	c.MarkFlagsMutuallyExclusive("authority-key", "authority-secret")
	flags.DurationVar(&f.lease, "lease", 30*time.Second, "how long the workloads of a host that is away stay ready")
	flags.DurationVar(&f.leafLife, "leaf-life", identity.WorkloadLife, "how long workloads' certificates live; renewed at half of it")
	flags.StringVar(&f.keepCertificates, "keep-certificates", "90d", "how long the store keeps certificates that have ended")
	return c
}

// collectAt is how much garbage there may be, in per cent of what is in use, before it is
// collected. Control holds much and makes little: half of Go's default costs it a
// hundredth of a processor and saves a large cluster's control a quarter of its memory.
const collectAt = 50

func runControl(ctx context.Context, f controlFlags, log *slog.Logger) (err error) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	viewers := 0
	if f.viewers != "" {
		if viewers, err = groupID(f.viewers); err != nil {
			return err
		}
	}
	kept, err := parseDays(f.keepCertificates)
	if err != nil || kept <= 0 {
		return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: fmt.Errorf("--keep-certificates %s", f.keepCertificates), Remedy: "want for instance 400d or 48h"}
	}
	cfg := control.Config{
		Data: f.data, Store: f.store, TrustDomain: f.trustDomain, Intent: f.config, Translate: kube.Translate,
		Lease: f.lease, LeafLife: f.leafLife, KeepEnded: kept, Viewers: viewers, Log: log, Advertise: f.advertise,
	}
	if f.authoritySecret != "" && !f.kubernetes {
		return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: errors.New("--authority-secret is for --kubernetes"), Remedy: "name a file with --authority-key"}
	}
	if f.authorityKey != "" {
		if cfg.Authority, err = identity.ReadSealingKeys(f.authorityKey); err != nil {
			return err
		}
	}
	if err := f.injector.check(f.kubernetes); err != nil {
		return err
	}
	var platform *kubernetes
	if f.kubernetes {
		if platform, err = openKubernetes(f.kubeconfig, f.namespace, f.injector.image, log); err != nil {
			return err
		}
		cfg.Cluster = &control.Cluster{Bearer: platform.bearer, Sidecars: f.injector.on()}
		cfg.Names = f.injector.names(f.namespace)
		if f.kubeconfig == "" { // in a pod
			if err := closeVolume(f.data); err != nil {
				return err
			}
		}
		if f.authoritySecret != "" {
			if cfg.Authority, err = platform.sealingKeys(ctx, f.authoritySecret); err != nil {
				return err
			}
		}
	}
	c, err := control.Open(ctx, cfg)
	if err != nil && ctx.Err() != nil {
		return nil // asked to end while another control held the store
	}
	if err != nil {
		return err
	}
	defer func() {
		if e := c.Close(); err == nil {
			err = e
		}
	}()
	operators, err := control.ListenSocket(f.socket, viewers)
	if err != nil {
		return err
	}
	defer operators.Close()
	remote, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.listen)
	if err != nil {
		return &assay.Error{Kind: assay.Conflict, Op: "listen on " + f.listen, Err: err, Remedy: "choose another with --listen"}
	}
	defer remote.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.Run(ctx) })
	group.Go(func() error { return c.ServeOperators(ctx, operators) })
	group.Go(func() error { return c.ServeRemote(ctx, remote) })
	if platform != nil {
		group.Go(func() error { return platform.run(ctx, c) })
	}
	if f.injector.on() {
		webhook, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.injector.listen)
		if err != nil {
			return &assay.Error{Kind: assay.Conflict, Op: "listen on " + f.injector.listen, Err: err, Remedy: "choose another with --injector-listen"}
		}
		group.Go(func() error { return f.injector.serve(ctx, c, webhook, f.namespace, log) })
	}
	log.Info("control is ready", "trust-domain", c.TrustDomain(), "hosts", remote.Addr().String(), "socket", f.socket, "data", f.data)
	return group.Wait()
}

func groupID(name string) (int, error) {
	if id, err := strconv.Atoi(name); err == nil && id > 0 {
		return id, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, &assay.Error{Kind: assay.Invalid, Op: "look up the viewers' group", Err: err, Remedy: "make the group, or give its number"}
	}
	id, err := strconv.Atoi(g.Gid)
	if err == nil && id == os.Getgid() && id == 0 {
		err = fmt.Errorf("group %s is the superuser's", name)
	}
	if err != nil {
		return 0, &assay.Error{Kind: assay.Invalid, Op: "look up the viewers' group", Err: err}
	}
	return id, nil
}
