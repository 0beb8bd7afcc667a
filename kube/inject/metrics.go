package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"assay.dev/kube"
)

// MetricsName is what the port of a sidecar's metrics is called.
const MetricsName = "assay-metrics"

// scrape begins the annotations by which Prometheus finds a pod.
const scrape = "prometheus.io/"

// metrics is the port of a pod's sidecar; 0 for none, with the reason where there should be one. The
// sidecar starts first: an application that has the port itself could not.
func (j *Injector) metrics(pod *corev1.Pod) (port int32, warning string) {
	if j.Metrics == 0 {
		return 0, ""
	}
	if declared, probed := kube.Ports(theirs(pod)); slices.Contains(append(declared, probed...), uint16(j.Metrics)) {
		return 0, fmt.Sprintf("the pod has port %d itself: its sidecar serves no metrics", j.Metrics)
	}
	return j.Metrics, ""
}

// scraped reports whether a pod tells Prometheus of metrics of its own, or that there are none to
// be read. There is one such place in a pod.
func scraped(pod *corev1.Pod) bool {
	for name := range pod.Annotations {
		if strings.HasPrefix(name, scrape) {
			return true
		}
	}
	return false
}
