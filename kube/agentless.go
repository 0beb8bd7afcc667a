package kube

import corev1 "k8s.io/api/core/v1"

// standIns are labels of nodes that stand for machines which nobody can put an agent on.
var standIns = []struct{ label, value string }{
	{"eks.amazonaws.com/compute-type", "fargate"}, // of EKS
	{"type", "virtual-kubelet"},                   // of every virtual-kubelet
}

// Agentless reports whether no agent can be on a node. One that does not say what it is may
// well be a Linux whose agent is missing.
func Agentless(labels map[string]string) bool {
	if system, said := labels[corev1.LabelOSStable]; said && system != "linux" {
		return true
	}
	return Virtual(labels)
}

// Virtual reports whether a node stands for other machines.
func Virtual(labels map[string]string) bool {
	for _, s := range standIns {
		if labels[s.label] == s.value {
			return true
		}
	}
	return false
}

// AgentlessLabels are those that say it.
func AgentlessLabels() []string {
	list := []string{corev1.LabelOSStable}
	for _, s := range standIns {
		list = append(list, s.label)
	}
	return list
}

// AgentNodes keeps pods that tolerate everything off nodes that are [Virtual].
func AgentNodes() *corev1.NodeAffinity {
	var term corev1.NodeSelectorTerm
	for _, s := range standIns {
		term.MatchExpressions = append(term.MatchExpressions, corev1.NodeSelectorRequirement{Key: s.label, Operator: corev1.NodeSelectorOpNotIn, Values: []string{s.value}})
	}
	return &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{term}}}
}
