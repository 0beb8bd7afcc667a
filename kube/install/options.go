package install

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"assay.dev"
	"assay.dev/kube"
	"assay.dev/kube/publish"
)

// Names of what is installed. The agents' and control's packages rely on them.
const (
	DefaultNamespace = "assay-system"
	ControlName      = "assay-control"       // service account, Deployment, Service, claim
	AgentName        = "assay-agent"         // service account, DaemonSet, Service of metrics
	SidecarName      = "assay-sidecar"       // PodMonitor
	TrustName        = publish.TrustName     // the ConfigMap with the authority's roots
	AuthorityName    = publish.AuthorityName // the Secret with the sealing key of a shared authority
	InjectorName     = publish.InjectorName  // the webhooks' configuration, and control's role for it
	ControlPort      = 7400
	InjectorPort     = 7443
	Audience         = "assay" // of the agents' tokens
	MeshLabel        = kube.MeshLabel
)

// Options are what an installation is made of. The zero value of each field but Image
// has a meaning that Complete writes out.
type Options struct {
	Namespace   string   // DefaultNamespace
	Image       string   // needed: with assay and assay-proxy in /usr/local/bin
	PullPolicy  string   // IfNotPresent
	PullSecrets []string // in Namespace, and for sidecars in the namespaces of their pods
	TrustDomain string   // cluster.local; that of an authority cannot be changed

	// Replicas of control: 1. More of them serve at the same time, and need StoreSecret.
	Replicas int32
	// StoreSecret names a Secret in Namespace whose key "url" is a store as in
	// `assay control --store`, on a PostgreSQL server: the authority is in it too, sealed under
	// the key in Secret AuthorityName. "": embedded, on control's volume.
	StoreSecret string
	// Volume of one replica is "claim", a PersistentVolumeClaim (the default), or "emptyDir":
	// for try-outs, since the authority ends with control's pod, and for a StoreSecret that has
	// the authority. Several replicas have no claim.
	Volume       string
	VolumeSize   string // of the claim; 1Gi
	StorageClass string // of the claim; "" is the cluster's default

	CNIConf   string // folder of network configurations on the nodes: /etc/cni/net.d
	CNIBin    string // folder of network plugins on the nodes: /opt/cni/bin
	CRISocket string // of the container runtime on the nodes; "": found by the agent

	// OlderGrace is how long connections that are older than a pod's capture may go on in a
	// strict namespace, as in "10m", which is what "" means.
	OlderGrace string

	// KeepCertificates is how long the store keeps certificates that have ended, in days or hours, as
	// in "400d" or "48h"; "" is control's 90d.
	KeepCertificates string

	// Injector has control put sidecars into pods that ask for one.
	Injector bool
	// NoAgent leaves the agents out, for clusters that allow none; it needs Injector.
	NoAgent bool

	// MetricsPort of every node serves Prometheus; 0 is 9181, -1 none.
	MetricsPort    int32
	ServiceMonitor bool // one for the Prometheus operator

	// SidecarMetricsPort of every pod that gets a sidecar serves Prometheus, in plaintext, also where the pod's
	// namespace is strict; 0: none.
	SidecarMetricsPort int32
	PodMonitor         bool // one for the Prometheus operator, of sidecars
}

// Volumes that control can have.
const (
	Claim    = "claim"
	EmptyDir = "emptyDir"
)

// Complete returns the options with every default written out, or what is wrong with
// them: an assay.Error of kind Invalid.
func (o Options) Complete() (Options, error) {
	o.Namespace = cmp.Or(o.Namespace, DefaultNamespace)
	o.PullPolicy = cmp.Or(o.PullPolicy, "IfNotPresent")
	o.TrustDomain = cmp.Or(o.TrustDomain, "cluster.local")
	o.Replicas = cmp.Or(o.Replicas, 1)
	o.Volume = cmp.Or(o.Volume, Claim)
	o.VolumeSize = cmp.Or(o.VolumeSize, "1Gi")
	o.CNIConf = cmp.Or(o.CNIConf, "/etc/cni/net.d")
	o.CNIBin = cmp.Or(o.CNIBin, "/opt/cni/bin")
	o.MetricsPort = cmp.Or(o.MetricsPort, 9181)
	return o, o.validate()
}

// kept is a time that control keeps certificates for; the chart's schema has the same.
var kept = regexp.MustCompile(`^[1-9][0-9]{0,3}[dh]$`)

func (o *Options) validate() error {
	wrong := func(what, cause, remedy string) error {
		return &assay.Error{Kind: assay.Invalid, Op: "install: " + what, Err: errors.New(cause), Remedy: remedy}
	}
	switch {
	case o.Image == "":
		return wrong("image", "it is needed: the nodes pull assay and assay-proxy in it", "build one as docs/kubernetes.md tells, and name it with --image")
	case strings.ContainsAny(o.Image, " \t\n"):
		return wrong("image", fmt.Sprintf("%q is no image's name", o.Image), "")
	case len(validation.IsDNS1123Label(o.Namespace)) > 0:
		return wrong("namespace", fmt.Sprintf("%q is no namespace's name", o.Namespace), "")
	case o.Namespace == "default" || strings.HasPrefix(o.Namespace, "kube-"):
		return wrong("namespace "+o.Namespace, "the mesh needs one of its own: its agents are privileged, and none of its pods is meshed", "leave out --namespace, or name a new one")
	case !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, o.PullPolicy):
		return wrong("image pull policy", fmt.Sprintf("%q is none", o.PullPolicy), "want Always, IfNotPresent or Never")
	case !assay.ValidTrustDomain(o.TrustDomain):
		return wrong("trust domain", fmt.Sprintf("%q is none", o.TrustDomain), "want a DNS name in lower case")
	case o.Volume != Claim && o.Volume != EmptyDir:
		return wrong("volume", fmt.Sprintf("%q is none", o.Volume), "want claim or emptyDir")
	case o.MetricsPort < -1 || o.MetricsPort > 65535:
		return wrong("metrics port", fmt.Sprintf("%d is none", o.MetricsPort), "want 1 to 65535, or -1 for no metrics")
	case o.KeepCertificates != "" && !kept.MatchString(o.KeepCertificates):
		return wrong("keep certificates", fmt.Sprintf("%q is no time in days or hours", o.KeepCertificates), "want for instance 400d or 48h")
	case o.NoAgent && !o.Injector:
		return wrong("without agents", "nothing would ever be meshed", "let pods have sidecars: --injector")
	case o.NoAgent && o.ServiceMonitor:
		return wrong("ServiceMonitor", "it finds the metrics of agents, and there are none", "")
	case o.ServiceMonitor && o.MetricsPort < 0:
		return wrong("ServiceMonitor", "there are no metrics", "name a port with --metrics-port")
	case o.SidecarMetricsPort < 0 || o.SidecarMetricsPort > 65535:
		return wrong("metrics port of sidecars", fmt.Sprintf("%d is none", o.SidecarMetricsPort), "want 1 to 65535, or 0 for no metrics")
	case o.SidecarMetricsPort > 0 && !o.Injector:
		return wrong("metrics port of sidecars", "no pod gets a sidecar", "let pods have sidecars: --injector")
	case o.PodMonitor && o.SidecarMetricsPort == 0:
		return wrong("PodMonitor", "it finds the metrics of sidecars, and there are none", "name a port with --sidecar-metrics-port")
	}
	if _, err := resource.ParseQuantity(o.VolumeSize); err != nil {
		return wrong("volume size "+o.VolumeSize, err.Error(), "want for instance 1Gi")
	}
	if d, err := time.ParseDuration(cmp.Or(o.OlderGrace, "10m")); err != nil || d <= 0 {
		return wrong("older grace", fmt.Sprintf("%q is no time", o.OlderGrace), "want for instance 10m")
	}
	for what, dir := range map[string]string{"CNI configuration folder": o.CNIConf, "CNI plugin folder": o.CNIBin, "CRI socket": o.CRISocket} {
		if dir != "" && (!path.IsAbs(dir) || path.Clean(dir) != dir || dir == "/") {
			return wrong(what, fmt.Sprintf("%q is no absolute path", dir), "")
		}
	}
	for _, name := range append(slices.Clone(o.PullSecrets), o.StoreSecret) {
		if name != "" && len(validation.IsDNS1123Subdomain(name)) > 0 {
			return wrong("secret", fmt.Sprintf("%q is no Secret's name", name), "")
		}
	}
	return o.validateReplicas()
}

// validateReplicas refuses what would be two meshes, or a control that never starts.
func (o *Options) validateReplicas() error {
	op := fmt.Sprintf("install %d replicas of control", o.Replicas)
	switch {
	case o.Replicas == 1:
		return nil
	case o.Replicas < 1:
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("a mesh has one at least")}
	case o.StoreSecret == "":
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("the embedded store is one control's alone"),
			Remedy: "name a Secret with the URL of a PostgreSQL store: --store-secret; or one replica: connections and proxies do not need control while it restarts"}
	}
	return nil
}

// several reports whether control is replaced one pod after the other, and has no volume.
func (o *Options) several() bool {
	return o.StoreSecret != "" && (o.Replicas > 1 || o.Volume == EmptyDir)
}

func (o *Options) metrics() bool { return o.MetricsPort > 0 }
