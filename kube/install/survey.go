package install

import (
	"context"
	"encoding/json"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Facts are what a cluster says of itself, as far as it decides what the mesh can do there.
type Facts struct {
	Version        string // the API server's, with the v
	Nodes          []corev1.Node
	Pods           []corev1.Pod
	DaemonSets     []appsv1.DaemonSet
	RuntimeClasses []nodev1.RuntimeClass
	Definitions    []apiextensionsv1.CustomResourceDefinition
	Cilium         map[string]string // its settings; nil without it
	Hidden         []string          // what this account may not see
}

// Survey looks at a cluster and changes nothing.
func (i *Installer) Survey(ctx context.Context) (*Facts, error) {
	text, err := i.server.Get().AbsPath("/version").DoRaw(ctx)
	if err != nil {
		return nil, i.explain("ask for the version", err)
	}
	var version struct{ GitVersion string }
	if err := json.Unmarshal(text, &version); err != nil {
		return nil, i.explain("ask for the version", err)
	}
	f := &Facts{Version: version.GitVersion}
	look := func(err error, what string) error {
		switch {
		case apierrors.IsForbidden(err):
			f.Hidden = append(f.Hidden, what)
		case err != nil && !apierrors.IsNotFound(err):
			return i.explain("look at "+what, err)
		}
		return nil
	}
	for what, read := range map[string]func() error{
		"nodes":      func() (err error) { f.Nodes, err = list[corev1.Node](ctx, i, "Node", "", ""); return },
		"pods":       func() (err error) { f.Pods, err = list[corev1.Pod](ctx, i, "Pod", "", ""); return },
		"daemonsets": func() (err error) { f.DaemonSets, err = list[appsv1.DaemonSet](ctx, i, "DaemonSet", "", ""); return },
		"runtime classes": func() (err error) {
			f.RuntimeClasses, err = list[nodev1.RuntimeClass](ctx, i, "RuntimeClass", "", "")
			return
		},
		"definitions": func() (err error) {
			f.Definitions, err = list[apiextensionsv1.CustomResourceDefinition](ctx, i, "CustomResourceDefinition", "", "")
			return
		},
		"Cilium's settings": func() error {
			m, err := get[corev1.ConfigMap](ctx, i, "ConfigMap", "kube-system", "cilium-config")
			if err == nil {
				f.Cilium = m.Data
			}
			return err
		},
	} {
		if err := look(read(), what); err != nil {
			return nil, err
		}
	}
	return f, nil
}
