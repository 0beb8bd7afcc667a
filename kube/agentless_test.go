package kube

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestAgentNodes: agents are put on every Linux node but on those that control expects none on.
func TestAgentNodes(t *testing.T) {
	expressions := AgentNodes().RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchExpressions
	takes := func(labels map[string]string) bool {
		for _, e := range expressions {
			value, there := labels[e.Key]
			if e.Operator != corev1.NodeSelectorOpNotIn {
				t.Fatalf("%+v", e)
			}
			if there && slices.Contains(e.Values, value) {
				return false
			}
		}
		return labels[corev1.LabelOSStable] == "linux"
	}
	for _, c := range []struct {
		labels map[string]string
		want   bool
	}{
		{map[string]string{"kubernetes.io/os": "linux"}, true},
		{map[string]string{"kubernetes.io/os": "linux", "type": "large", "eks.amazonaws.com/compute-type": "ec2"}, true},
		{map[string]string{"kubernetes.io/os": "linux", "type": "virtual-kubelet"}, false},
		{map[string]string{"kubernetes.io/os": "linux", "eks.amazonaws.com/compute-type": "fargate"}, false},
		{map[string]string{"kubernetes.io/os": "windows"}, false},
	} {
		if takes(c.labels) != c.want || Agentless(c.labels) == c.want {
			t.Errorf("%v: an agent is put there: %v; control expects none: %v", c.labels, takes(c.labels), Agentless(c.labels))
		}
		for name := range c.labels {
			if !slices.Contains(AgentlessLabels(), name) {
				t.Errorf("%s decides, and is not kept", name)
			}
		}
	}
}
