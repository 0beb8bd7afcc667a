package cluster

import (
	"fmt"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// BenchmarkPodChange: what one change of a pod costs in clusters of several sizes, and
// what is held for a pod with its share of services and slices.
func BenchmarkPodChange(b *testing.B) {
	for _, pods := range []int{1250, 5000, 10000} {
		b.Run(fmt.Sprint(pods), func(b *testing.B) {
			before := heap()
			m := newModel()
			var list []*corev1.Pod
			for s := range pods / 5 {
				list = append(list, populate(m, s, 5)...)
			}
			m.changes()
			held := heap() - before
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				p := list[i%len(list)].DeepCopy()
				p.Status.Conditions[0].Status = map[bool]corev1.ConditionStatus{true: corev1.ConditionFalse, false: corev1.ConditionTrue}[i/len(list)%2 == 0]
				m.setPod(p)
				if c := m.changes(); len(c.Pods) != 1 {
					b.Fatalf("%+v", c)
				}
			}
			b.ReportMetric(float64(held)/float64(pods), "held-B/pod")
			runtime.KeepAlive(m)
		})
	}
}

func heap() uint64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// populate adds a service, its slice and its pods.
func populate(m *model, service, pods int) []*corev1.Pod {
	name := fmt.Sprintf("service-%d", service)
	meta := metav1.ObjectMeta{Namespace: "shop", Name: name}
	m.setService(&corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, Selector: map[string]string{"app": name},
		Ports: []corev1.ServicePort{{Name: "http", Port: 80}},
	}})
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4,
		Ports: []discoveryv1.EndpointPort{{Name: pointer("http"), Port: pointer(int32(8080))}},
	}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: name}
	var list []*corev1.Pod
	for i := range pods {
		uid := types.UID(fmt.Sprintf("%08d-0000-4000-8000-%012d", service, i))
		address := fmt.Sprintf("10.%d.%d.%d", 1+service>>8, service&255, 1+i)
		p := trimPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, i), UID: uid, Labels: map[string]string{"app": name, "pod-template-hash": "5d8f7c"}},
			Spec:       corev1.PodSpec{NodeName: fmt.Sprintf("node-%d", i), ServiceAccountName: name},
			Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: address}}, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		})
		m.setPod(p)
		list = append(list, p)
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}, TargetRef: &corev1.ObjectReference{Kind: "Pod", UID: uid}})
	}
	m.setSlice(slice)
	return list
}

func pointer[T any](v T) *T { return &v }
