package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"assay.dev"

	"assay.dev/kube/apiserver"
)

// manager owns the fields that are applied.
const manager = "assay"

// Installer changes one cluster, as the account of a kubeconfig.
type Installer struct {
	objects dynamic.Interface
	server  rest.Interface // for what is no object
	host    string
	say     func(format string, args ...any)
}

// Open returns an Installer for the cluster of a kubeconfig and a context in it; "" are
// kubectl's defaults. It does not connect yet. say is told every step, as a line for
// people.
func Open(kubeconfig, context string, say func(format string, args ...any)) (*Installer, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read how to reach the API server", Err: err, Remedy: "name a file with --kubeconfig, and a context in it with --context"}
	}
	config.UserAgent, config.QPS = "assay-install", -1
	config.WarningHandler = rest.NoWarnings{}
	i := &Installer{host: config.Host, say: say}
	if i.objects, err = dynamic.NewForConfig(config); err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "reach the API server " + config.Host, Err: err}
	}
	if i.server, err = apiserver.Client(config, corev1.SchemeGroupVersion, apiserver.JSON, corev1.AddToScheme); err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "reach the API server " + config.Host, Err: err}
	}
	return i, nil
}

// Install applies the objects, in order, waits until control and every agent are ready, and
// verifies that all nodes have joined. Over an installation it is an upgrade. It ends with
// ctx at the latest, with what it waited for.
func (i *Installer) Install(ctx context.Context, o Options) error {
	o, err := o.Complete()
	if err != nil {
		return err
	}
	objects, err := Objects(o)
	if err != nil {
		return err
	}
	if err := i.refuseHelm(ctx, o.Namespace, "use helm upgrade"); err != nil {
		return err
	}
	if err := i.refuseAgents(ctx, &o); err != nil {
		return err
	}
	if err := i.refuseSidecars(ctx, &o); err != nil {
		return err
	}
	if err := i.refuseOtherAuthority(ctx, &o); err != nil {
		return err
	}
	for _, object := range objects {
		if object.GetName() == AgentName && object.GetObjectKind().GroupVersionKind().Kind == "DaemonSet" {
			// New agents replace every proxy, and each wants a certificate: control must not
			// be on its way to another pod meanwhile.
			if err := i.awaitControl(ctx, o.Namespace); err != nil {
				return err
			}
		}
		if err := i.apply(ctx, object); err != nil {
			return err
		}
	}
	if err := i.setLeaving(ctx, o.Namespace, ""); err != nil { // of an uninstallation that did not come to its end
		return err
	}
	if err := i.prune(ctx, o, objects); err != nil {
		return err
	}
	ready := i.awaitAgents
	if o.NoAgent {
		ready = i.awaitControl
	}
	if err := ready(ctx, o.Namespace); err != nil {
		return err
	}
	return i.verify(ctx, &o)
}

// refuseOtherAuthority keeps the mesh's authority: several controls have no volume, and would make another
// one while it is in that of the one control of before.
func (i *Installer) refuseOtherAuthority(ctx context.Context, o *Options) error {
	if !o.several() {
		return nil
	}
	_, err := i.in("PersistentVolumeClaim", o.Namespace).Get(ctx, ControlName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return i.explain("look for the authority's volume", err)
	}
	key, err := i.in("Secret", o.Namespace).Get(ctx, AuthorityName, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return i.explain("look for the authority's key", err)
	}
	if err == nil {
		if data, _, _ := unstructured.NestedMap(key.Object, "data"); len(data) > 0 {
			return nil // the authority is in the store
		}
	}
	return &assay.Error{Kind: assay.Conflict, Op: "install control without a volume", Err: fmt.Errorf("the mesh's authority is in the volume of persistentvolumeclaim/%s, and not in the store yet", ControlName),
		Remedy: "install with --store-secret and one replica first, which puts it there; or delete the claim, if that mesh is over"}
}

// apply is one server-side apply.
func (i *Installer) apply(ctx context.Context, o Object) error {
	u, err := Unstructured(o)
	if err != nil {
		return err
	}
	op := "apply " + title(u)
	before, err := i.of(u).Get(ctx, u.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return i.explain(op, err)
	}
	was := ""
	if err == nil {
		was = before.GetResourceVersion()
	}
	after, err := i.of(u).Apply(ctx, u.GetName(), u, metav1.ApplyOptions{FieldManager: manager, Force: true})
	if err != nil {
		return i.explain(op, err)
	}
	switch after.GetResourceVersion() {
	case was:
		i.say("%s unchanged", title(u))
	default:
		if was == "" {
			i.say("%s created", title(u))
		} else {
			i.say("%s changed", title(u))
		}
	}
	return nil
}

// of is where an object is kept.
func (i *Installer) of(u *unstructured.Unstructured) dynamic.ResourceInterface {
	return i.in(u.GetKind(), u.GetNamespace())
}

func (i *Installer) in(kind, namespace string) dynamic.ResourceInterface {
	all := i.objects.Resource(resources[kind])
	if namespace == "" {
		return all
	}
	return all.Namespace(namespace)
}

func title(u *unstructured.Unstructured) string {
	return strings.ToLower(u.GetKind()) + "/" + u.GetName()
}

// everything is all that any choice of options installs.
func everything(namespace string) ([]Object, error) {
	all, err := Objects(Options{Namespace: namespace, Image: "none", ServiceMonitor: true, Replicas: 2, StoreSecret: "none", Injector: true, SidecarMetricsPort: 1, PodMonitor: true})
	if err != nil {
		return nil, err
	}
	// Before control, which holds it: they are deleted from the last to the first.
	return append([]Object{claim(&Options{Namespace: namespace, VolumeSize: "1Gi"})}, all...), nil
}

// keepsAuthority reports whether without an object of this kind the mesh would be lost.
func keepsAuthority(kind string) bool { return kind == "PersistentVolumeClaim" || kind == "Secret" }

// prune removes what an earlier choice of options had installed. The authority's volume and
// key stay.
func (i *Installer) prune(ctx context.Context, o Options, wanted []Object) error {
	all, err := everything(o.Namespace)
	if err != nil {
		return err
	}
	for _, x := range all {
		kind := x.GetObjectKind().GroupVersionKind().Kind
		same := func(w Object) bool {
			return w.GetObjectKind().GroupVersionKind().Kind == kind && w.GetName() == x.GetName()
		}
		if keepsAuthority(kind) || slices.ContainsFunc(wanted, same) {
			continue
		}
		if err := i.remove(ctx, kind, x.GetNamespace(), x.GetName()); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes an object and waits until it is gone, with what belongs to it. One that
// is not there, or whose kind is not, is gone.
func (i *Installer) remove(ctx context.Context, kind, namespace, name string) error {
	op := fmt.Sprintf("delete %s/%s", strings.ToLower(kind), name)
	propagation := metav1.DeletePropagationBackground
	if kind == "Deployment" || kind == "DaemonSet" {
		propagation = metav1.DeletePropagationForeground
	}
	err := i.in(kind, namespace).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &propagation})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return i.explain(op, err)
	}
	err = i.await(ctx, op, func() (string, error) {
		u, err := i.in(kind, namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		held := slices.DeleteFunc(u.GetFinalizers(), func(f string) bool { return f == metav1.FinalizerDeleteDependents })
		if len(held) > 0 {
			return "it is held by " + strings.Join(held, ", "), nil
		}
		return "it is ending", nil
	})
	if err == nil {
		i.say("%s/%s deleted", strings.ToLower(kind), name)
	}
	return err
}

// refuseHelm leaves alone what Helm installed: it would take it for its own again.
func (i *Installer) refuseHelm(ctx context.Context, namespace, remedy string) error {
	u, err := i.in("Deployment", namespace).Get(ctx, ControlName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return i.explain("look for an installation in "+namespace, err)
	}
	if release := u.GetAnnotations()["meta.helm.sh/release-name"]; release != "" {
		return &assay.Error{Kind: assay.Conflict, Op: "change the installation in " + namespace, Err: fmt.Errorf("it is Helm's release %s", release), Remedy: remedy}
	}
	return nil
}

// refuseAgents leaves agents where they are that this installation would not have: only an agent
// takes its pods, and the network plugin on its node, out of the mesh.
func (i *Installer) refuseAgents(ctx context.Context, o *Options) error {
	if !o.NoAgent {
		return nil
	}
	_, err := i.in("DaemonSet", o.Namespace).Get(ctx, AgentName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return i.explain("look for agents in "+o.Namespace, err)
	}
	return &assay.Error{Kind: assay.Conflict, Op: "install without agents", Err: errors.New("there are agents in " + o.Namespace), Remedy: "take the mesh out first: assay uninstall"}
}

// explain turns an error of the API server into one for people.
func (i *Installer) explain(op string, err error) error {
	e := &assay.Error{Kind: assay.Internal, Op: op, Err: err}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		e.Kind, e.Remedy = assay.Unavailable, "run it again: it goes on where it was"
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		e.Kind, e.Remedy = assay.Denied, "use an account that administers the cluster"
	case apierrors.IsNotFound(err):
		e.Kind, e.Remedy = assay.NotFound, "the API server does not know this kind, or the namespace is gone"
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		e.Kind, e.Remedy = assay.Invalid, "what cannot be changed must be deleted first, with what depends on it"
	case apierrors.IsConflict(err):
		e.Kind, e.Remedy = assay.Conflict, "run it again"
	case apierrors.ReasonForError(err) == metav1.StatusReasonUnknown:
		e.Kind, e.Op, e.Remedy = assay.Unavailable, op+" at "+i.host, "see that the API server answers: kubectl version"
	}
	return e
}

// lookEvery is how often something that is waited for is looked at.
const lookEvery = time.Second

// await looks until there is nothing left to wait for, and says what there is whenever that
// changes. A look that fails is tried again: an API server may be replaced meanwhile.
func (i *Installer) await(ctx context.Context, op string, look func() (waiting string, err error)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for said := ""; ; {
		waiting, err := look()
		if err == nil && waiting == "" {
			return nil
		}
		if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			return i.explain(op, err)
		}
		if err != nil && ctx.Err() == nil {
			waiting = err.Error()
		}
		if waiting != said && ctx.Err() == nil {
			said = waiting
			i.say("%s: %s", op, waiting)
		}
		select {
		case <-ctx.Done():
			return &assay.Error{Kind: assay.Unavailable, Op: op, Err: fmt.Errorf("%w: %s", context.Cause(ctx), said), Remedy: "run it again: it goes on where it was; --timeout gives it longer"}
		case <-tick.C:
		}
	}
}

// list reads all objects of a kind in a namespace, "" for all, as a Go type.
func list[T any](ctx context.Context, i *Installer, kind, namespace, selector string) ([]T, error) {
	var out []T
	options := metav1.ListOptions{LabelSelector: selector, Limit: 500}
	for {
		page, err := i.in(kind, namespace).List(ctx, options)
		if err != nil {
			return nil, err
		}
		for _, u := range page.Items {
			var x T
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &x); err != nil {
				return nil, err
			}
			out = append(out, x)
		}
		if options.Continue = page.GetContinue(); options.Continue == "" {
			return out, nil
		}
	}
}

// get reads one object as a Go type.
func get[T any](ctx context.Context, i *Installer, kind, namespace, name string) (*T, error) {
	u, err := i.in(kind, namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	x := new(T)
	return x, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, x)
}
