package install

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestAgentsReady(t *testing.T) {
	for _, c := range []struct {
		what                     string
		seen                     int64
		want, updated, available int32
		ready, nobody            bool
	}{
		{"the DaemonSet was not looked at since", 1, 3, 3, 3, false, false},
		{"one is of before", 2, 3, 2, 3, false, false},
		{"one is missing", 2, 3, 3, 2, false, false},
		{"all are there", 2, 3, 3, 3, true, false},
		{"there is no node for one", 2, 0, 0, 0, false, true},
		{"there may be one", 1, 0, 0, 0, false, false},
	} {
		ready, why := agentsReady(&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Generation: 2}, Status: appsv1.DaemonSetStatus{
			ObservedGeneration: c.seen, DesiredNumberScheduled: c.want, UpdatedNumberScheduled: c.updated, NumberAvailable: c.available,
		}})
		if ready != c.ready || strings.Contains(why, "--no-agent") != c.nobody {
			t.Errorf("%s: %v, %q", c.what, ready, why)
		}
	}
}
