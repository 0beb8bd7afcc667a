package install

import (
	"bytes"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"assay.dev"
)

// Object is one object of an installation.
type Object interface {
	metav1.Object
	runtime.Object
}

// Objects are those of an installation, in the order in which they are applied.
func Objects(o Options) ([]Object, error) {
	o, err := o.Complete()
	if err != nil {
		return nil, err
	}
	definitions, err := Definitions()
	if err != nil {
		return nil, err
	}
	list := []Object{namespace(&o)}
	for _, d := range definitions {
		list = append(list, d)
	}
	list = append(list, accounts(&o)...)
	list = append(list, trust(&o))
	list = append(list, controlObjects(&o)...)
	if !o.NoAgent {
		list = append(list, agentObjects(&o)...)
	}
	if o.Injector {
		list = append(list, injector(&o))
	}
	if o.PodMonitor {
		list = append(list, podMonitor(&o))
	}
	return list, nil
}

// namespace admits privileged pods, which the agent's are. Control's is restricted.
func namespace(o *Options) *corev1.Namespace {
	return &corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: o.Namespace, Labels: labels("", map[string]string{
			"pod-security.kubernetes.io/enforce": "privileged",
			"pod-security.kubernetes.io/audit":   "privileged",
			"pod-security.kubernetes.io/warn":    "privileged",
		})},
	}
}

// trust is empty: control writes the authority's roots into it. It may do so to this one
// alone, and therefore does not make it.
func trust(o *Options) *corev1.ConfigMap {
	return &corev1.ConfigMap{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"}, ObjectMeta: meta(o, TrustName, "control")}
}

// labels are those that objects of a component have, "" for all.
func labels(component string, more map[string]string) map[string]string {
	m := map[string]string{"app.kubernetes.io/name": "assay", "app.kubernetes.io/part-of": "assay"}
	if component != "" {
		m["app.kubernetes.io/component"] = component
	}
	for k, v := range more {
		m[k] = v
	}
	return m
}

// selector finds a component's pods. It cannot be changed in an upgrade.
func selector(component string) map[string]string {
	return map[string]string{"app.kubernetes.io/name": "assay", "app.kubernetes.io/component": component}
}

func meta(o *Options, name, component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: o.Namespace, Labels: labels(component, nil)}
}

// resources are where the API has the kinds of an installation, newest first of what
// another choice of options may have left.
var resources = map[string]schema.GroupVersionResource{
	"Namespace":                    {Version: "v1", Resource: "namespaces"},
	"CustomResourceDefinition":     {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	"ServiceAccount":               {Version: "v1", Resource: "serviceaccounts"},
	"ClusterRole":                  {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding":           {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
	"Role":                         {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"},
	"RoleBinding":                  {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	"ConfigMap":                    {Version: "v1", Resource: "configmaps"},
	"PersistentVolumeClaim":        {Version: "v1", Resource: "persistentvolumeclaims"},
	"Service":                      {Version: "v1", Resource: "services"},
	"Deployment":                   {Group: "apps", Version: "v1", Resource: "deployments"},
	"DaemonSet":                    {Group: "apps", Version: "v1", Resource: "daemonsets"},
	"NetworkPolicy":                {Group: "networking.k8s.io", Version: "v1", Resource: "networkpolicies"},
	"PodDisruptionBudget":          {Group: policyv1.GroupName, Version: "v1", Resource: "poddisruptionbudgets"},
	"PodMonitor":                   {Group: "monitoring.coreos.com", Version: "v1", Resource: "podmonitors"},
	"ServiceMonitor":               {Group: "monitoring.coreos.com", Version: "v1", Resource: "servicemonitors"},
	"Pod":                          {Version: "v1", Resource: "pods"},
	"MutatingWebhookConfiguration": {Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations"},
	"Secret":                       {Version: "v1", Resource: "secrets"},
	// Not installed, but read.
	"Event":        {Version: "v1", Resource: "events"},
	"Node":         {Version: "v1", Resource: "nodes"},
	"RuntimeClass": {Group: "node.k8s.io", Version: "v1", Resource: "runtimeclasses"},
}

// Unstructured is the object as it is applied: without what only a server fills in.
func Unstructured(o Object) (*unstructured.Unstructured, error) {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: fmt.Sprintf("write %T %s", o, o.GetName()), Err: err}
	}
	delete(m, "status")
	withoutNulls(m)
	return &unstructured.Unstructured{Object: m}, nil
}

// withoutNulls removes what Go has no way to leave out, such as a creationTimestamp.
func withoutNulls(v any) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			if x == nil {
				delete(v, k)
				continue
			}
			withoutNulls(x)
		}
	case []any:
		for _, x := range v {
			withoutNulls(x)
		}
	}
}

// YAML writes the objects as `kubectl apply` reads them.
func YAML(objects []Object) ([]byte, error) {
	var b bytes.Buffer
	for _, o := range objects {
		u, err := Unstructured(o)
		if err != nil {
			return nil, err
		}
		text, err := yaml.Marshal(u.Object)
		if err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: "write " + u.GetKind() + " " + u.GetName(), Err: err}
		}
		if b.Len() > 0 {
			b.WriteString("---\n")
		}
		b.Write(text)
	}
	return b.Bytes(), nil
}
