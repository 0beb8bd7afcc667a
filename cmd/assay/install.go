package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	installation "assay.dev/kube/install"
)

// clusterFlags say which cluster a command is about.
type clusterFlags struct{ kubeconfig, context string }

func (f *clusterFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "file that says how to reach the API server (as kubectl: $KUBECONFIG, ~/.kube/config)")
	cmd.Flags().StringVar(&f.context, "context", "", "context in it (the current one)")
}

// open connects to the cluster. Steps are told on w, a line each.
func (f *clusterFlags) open(w io.Writer) (*installation.Installer, error) {
	return installation.Open(f.kubeconfig, f.context, func(format string, args ...any) {
		fmt.Fprintln(w, oneLine(fmt.Sprintf(format, args...)))
	})
}

func installCommand() *cobra.Command {
	var cluster clusterFlags
	var o installation.Options
	var dryRun bool
	var output string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "install --image IMAGE",
		Short: "Install the mesh into a Kubernetes cluster, or upgrade it",
		Long: `Install applies every object of the mesh to a cluster, waits until control and the
agent of every node are ready, and verifies that all nodes have joined. Nothing is
meshed by that: label a namespace ` + installation.MeshLabel + `=enabled, and its pods are, without a
restart.

Repeated, it is an upgrade, also of the options. Ask first what the mesh can do in this
cluster: assay check --pre. docs/kubernetes.md has the whole.`,
		Example: "  assay install --image assay.example/assay:1\n  assay install --image assay.example/assay:1 --dry-run -o yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFormat(output, "yaml", "json"); err != nil {
				return err
			}
			if dryRun {
				return printObjects(cmd.OutOrStdout(), o, output)
			}
			if cmd.Flags().Changed("output") {
				return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: errors.New("-o is for --dry-run")}
			}
			if _, err := o.Complete(); err != nil {
				return err
			}
			i, err := cluster.open(cmd.OutOrStdout())
			if err != nil {
				return err
			}
			return within(cmd.Context(), timeout, func(ctx context.Context) error { return i.Install(ctx, o) })
		},
	}
	cluster.flags(c)
	f := c.Flags()
	f.StringVar(&o.Namespace, "namespace", installation.DefaultNamespace, "namespace of the mesh itself")
	f.StringVar(&o.Image, "image", "", "image with assay and assay-proxy")
	f.StringVar(&o.PullPolicy, "image-pull-policy", "IfNotPresent", "Always, IfNotPresent or Never")
	f.StringSliceVar(&o.PullSecrets, "image-pull-secret", nil, "Secret to pull it with, in --namespace and for sidecars in the namespaces of their pods; may be repeated")
	f.StringVar(&o.TrustDomain, "trust-domain", "cluster.local", "trust domain of a new mesh")
	f.Int32Var(&o.Replicas, "replicas", 1, "replicas of control; more than one need --store-secret")
	f.StringVar(&o.StoreSecret, "store-secret", "", "Secret whose key url is a PostgreSQL store, for the authority too (default: embedded)")
	f.StringVar(&o.Volume, "volume", installation.Claim, "where the authority's keys of one replica are: claim, or emptyDir, which ends with control's pod")
	f.StringVar(&o.VolumeSize, "volume-size", "1Gi", "size of the claim")
	f.StringVar(&o.StorageClass, "storage-class", "", "storage class of the claim (the cluster's default)")
	f.StringVar(&o.CNIConf, "cni-conf", "/etc/cni/net.d", "folder of network configurations on the nodes")
	f.StringVar(&o.CNIBin, "cni-bin", "/opt/cni/bin", "folder of network plugins on the nodes")
	f.StringVar(&o.CRISocket, "cri", "", "socket of the container runtime on the nodes (found)")
	f.StringVar(&o.OlderGrace, "older-grace", "", "how long connections that are older than a pod's capture, and plaintext of before, may go on in a strict namespace (10m)")
	f.StringVar(&o.KeepCertificates, "keep-certificates", "", "how long the store keeps certificates that have ended, as in 400d or 48h (90d)")
	f.Int32Var(&o.MetricsPort, "metrics-port", 9181, "port of every node where Prometheus finds metrics; -1 for none")
	f.BoolVar(&o.ServiceMonitor, "service-monitor", false, "make one for the Prometheus operator")
	f.Int32Var(&o.SidecarMetricsPort, "sidecar-metrics-port", 0, "with --injector: port of every pod with a sidecar where Prometheus finds its metrics, as whoever reaches the pod (none)")
	f.BoolVar(&o.PodMonitor, "pod-monitor", false, "make one for the Prometheus operator, of sidecars")
	f.BoolVar(&o.Injector, "injector", false, "put a sidecar into pods that are labelled "+installation.MeshLabel+"=sidecar when they are made")
	f.BoolVar(&o.NoAgent, "no-agent", false, "with --injector: install no agents, for clusters that allow no privileged pods on their nodes")
	f.BoolVar(&dryRun, "dry-run", false, "print the objects and change nothing")
	f.StringVarP(&output, "output", "o", "yaml", "with --dry-run: yaml or json")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "end after this time, with what is still waited for")
	return c
}

// printObjects writes an installation as files.
func printObjects(w io.Writer, o installation.Options, format string) error {
	objects, err := installation.Objects(o)
	if err != nil {
		return err
	}
	if format == "yaml" {
		text, err := installation.YAML(objects)
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	}
	items := make([][]byte, len(objects))
	for i, object := range objects {
		u, err := installation.Unstructured(object)
		if err != nil {
			return err
		}
		if items[i], err = json.Marshal(u.Object); err != nil {
			return err
		}
	}
	return writeJSON(w, items)
}

// within gives work a time to end in.
func within(ctx context.Context, limit time.Duration, work func(context.Context) error) error {
	if limit <= 0 {
		return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: fmt.Errorf("--timeout %v", limit), Remedy: "want for instance 5m"}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	return work(ctx)
}

func uninstallCommand() *cobra.Command {
	var cluster clusterFlags
	var r installation.Removal
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the mesh out of a Kubernetes cluster",
		Long: `Uninstall releases every meshed pod on every node, takes Assay's network plugin out of
the nodes' configuration, and then deletes control and the rest. Pods go on talking all the
while, from then on as they did before. It says what it leaves: without --purge that are the
authority's keys, and the definitions of Assay's kinds with what is declared. The Gateway
API is not touched.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := cluster.open(cmd.OutOrStdout())
			if err != nil {
				return err
			}
			return within(cmd.Context(), timeout, func(ctx context.Context) error { return i.Uninstall(ctx, r) })
		},
	}
	cluster.flags(c)
	f := c.Flags()
	f.StringVar(&r.Namespace, "namespace", installation.DefaultNamespace, "namespace of the mesh itself")
	f.BoolVar(&r.Purge, "purge", false, "also the authority's keys, and the definitions of Assay's kinds with every object of theirs")
	f.DurationVar(&r.Drain, "drain", 30*time.Second, "how long connections through the proxies may go on")
	f.BoolVar(&r.NodesOnly, "nodes-only", false, "release every pod, clean the nodes, and leave the objects: before helm uninstall")
	f.BoolVar(&r.Force, "force", false, "go on when a node could not be cleaned: its pods lose their connections when their certificates end")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "end after this time, with what is still waited for")
	return c
}

// survey prints what the mesh can do in a cluster, before it is there.
func survey(cmd *cobra.Command, cluster *clusterFlags, output string) error {
	i, err := cluster.open(io.Discard)
	if err != nil {
		return err
	}
	var facts *installation.Facts
	err = within(cmd.Context(), time.Minute, func(ctx context.Context) error {
		facts, err = i.Survey(ctx)
		return err
	})
	if err != nil {
		return err
	}
	list := installation.Judge(facts)
	if output == "json" {
		items, err := encode(list)
		if err != nil {
			return err
		}
		err = writeJSON(cmd.OutOrStdout(), items)
		if err != nil {
			return err
		}
	} else if _, err := io.WriteString(cmd.OutOrStdout(), judgementsText(list)); err != nil {
		return err
	}
	for _, j := range list {
		if j.Status != installation.OK {
			return exit(exitFindings, nil)
		}
	}
	return nil
}

// judgementsText writes judgements for people, each bad one with its remedy.
func judgementsText(list []installation.Judgement) string {
	var b strings.Builder
	count := map[installation.Status]int{}
	for _, j := range list {
		count[j.Status]++
		fmt.Fprintf(&b, "%-4s  %s: %s\n      %s\n", j.Status, j.Check, oneLine(j.Subject), oneLine(j.Detail))
		if j.Remedy != "" {
			fmt.Fprintf(&b, "      remedy: %s\n", oneLine(j.Remedy))
		}
	}
	fmt.Fprintf(&b, "%d ok, %d warn, %d fail\n", count[installation.OK], count[installation.Warn], count[installation.Fail])
	return b.String()
}
