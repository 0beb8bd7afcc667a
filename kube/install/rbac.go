package install

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"assay.dev/kube/cluster"
	knode "assay.dev/kube/node"
	"assay.dev/kube/publish"
	"assay.dev/kube/review"
)

// ControlRules are what control may do in every namespace.
func ControlRules() []rbacv1.PolicyRule {
	return slices.Concat(cluster.Rules(), review.Rules(), publish.Rules())
}

// ControlLocalRules are what control may do in the namespace of the mesh.
func ControlLocalRules() []rbacv1.PolicyRule { return publish.LocalRules() }

// AgentRules are what agents may do in every namespace.
func AgentRules() []rbacv1.PolicyRule { return knode.Rules() }

// AgentLocalRules are what agents may do in the namespace of the mesh.
func AgentLocalRules() []rbacv1.PolicyRule { return knode.SystemRules() }

// InjectorRules are what control may do beside that in the cluster when it injects sidecars.
func InjectorRules() []rbacv1.PolicyRule {
	return slices.Concat(cluster.SidecarRules(), publish.InjectorRules())
}

// accounts are the service accounts and what they may do.
func accounts(o *Options) []Object {
	list := controlAccount(o)
	if o.Injector {
		list = append(list, injectorRole(o)...)
	}
	if !o.NoAgent {
		list = append(list, agentAccount(o)...)
	}
	return list
}

func controlAccount(o *Options) []Object {
	return account(o, ControlName, "control", ControlRules(), ControlLocalRules())
}

func agentAccount(o *Options) []Object {
	return account(o, AgentName, "agent", AgentRules(), AgentLocalRules())
}

// injectorRole is control's, of its own so that control without an injector may do less.
func injectorRole(o *Options) []Object {
	whole := metav1.ObjectMeta{Name: InjectorName, Labels: labels("control", nil)}
	return []Object{
		&rbacv1.ClusterRole{TypeMeta: rbac("ClusterRole"), ObjectMeta: whole, Rules: InjectorRules()},
		&rbacv1.ClusterRoleBinding{TypeMeta: rbac("ClusterRoleBinding"), ObjectMeta: whole,
			Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: ControlName, Namespace: o.Namespace}},
			RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: InjectorName}},
	}
}

func rbac(kind string) metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: kind}
}

func account(o *Options, name, component string, everywhere, local []rbacv1.PolicyRule) []Object {
	whole := metav1.ObjectMeta{Name: name, Labels: labels(component, nil)}
	subjects := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: name, Namespace: o.Namespace}}
	role := func(kind string) rbacv1.RoleRef {
		return rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: name}
	}
	return []Object{
		&corev1.ServiceAccount{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceAccount"}, ObjectMeta: meta(o, name, component)},
		&rbacv1.ClusterRole{TypeMeta: rbac("ClusterRole"), ObjectMeta: whole, Rules: everywhere},
		&rbacv1.ClusterRoleBinding{TypeMeta: rbac("ClusterRoleBinding"), ObjectMeta: whole, Subjects: subjects, RoleRef: role("ClusterRole")},
		&rbacv1.Role{TypeMeta: rbac("Role"), ObjectMeta: meta(o, name, component), Rules: local},
		&rbacv1.RoleBinding{TypeMeta: rbac("RoleBinding"), ObjectMeta: meta(o, name, component), Subjects: subjects, RoleRef: role("Role")},
	}
}
