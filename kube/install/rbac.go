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

// accounts are the two service accounts and what they may do.
func accounts(o *Options) []Object {
	return slices.Concat(
		account(o, ControlName, "control", ControlRules(), ControlLocalRules()),
		account(o, AgentName, "agent", AgentRules(), AgentLocalRules()),
	)
}

func account(o *Options, name, component string, everywhere, local []rbacv1.PolicyRule) []Object {
	rbac := func(kind string) metav1.TypeMeta {
		return metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: kind}
	}
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
