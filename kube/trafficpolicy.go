package kube

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/kube/v1alpha1"
)

var trafficPolicyType = reflect.TypeFor[v1alpha1.TrafficPolicy]()

// trafficPolicy reads an assay.dev/v1alpha1 TrafficPolicy.
func (d *document) trafficPolicy() {
	var in struct {
		Spec v1alpha1.TrafficPolicySpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	s := &in.Spec
	out := assay.TrafficPolicy{Namespace: d.namespace, Name: d.meta.Name, Services: d.targets(s.TargetRefs)}
	if t := s.Timeouts; t != nil {
		out.Timeout, out.TryTimeout = d.off("spec.timeouts.request", t.Request), d.off("spec.timeouts.try", t.Try)
		if out.Timeout > 0 && out.TryTimeout > out.Timeout {
			d.at("spec.timeouts.try", "a try may not take longer than the request (%v)", out.Timeout)
		}
	}
	d.policyRetry(s, &out.Retry)
	if e := s.Ejection; e != nil {
		out.Ejection.BreakerPolicy = d.policyBreaker("spec.ejection.", &e.Breaker)
		out.Ejection.MaxPercent = d.count("spec.ejection.maxPercent", e.MaxPercent, 100)
	}
	if c := s.Circuit; c != nil {
		out.Circuit = d.policyBreaker("spec.circuit.", c)
		if whole := out.WithDefaults().Circuit; whole.Off() {
			d.missing("spec.circuit", "say when it opens: consecutiveFailures, failurePercent or slowerThan")
		}
	}
	out.SlowStart = d.off("spec.slowStart", s.SlowStart)
	out.PanicPercent = d.count("spec.panicPercent", s.PanicPercent, 100)
	switch s.Locality {
	case "", "PreferZone":
	case "Any":
		out.AnyZone = true
	default:
		d.at("spec.locality", "%q: want PreferZone or Any", s.Locality)
	}
	out.MaxConnections = d.bound("spec.maxConnections", s.MaxConnections)
	d.policyInbound(s.Inbound, &out.Inbound)
	d.intent.Policies = append(d.intent.Policies, out)
	d.keep(s)
}

func (d *document) policyBreaker(path string, b *v1alpha1.Breaker) assay.BreakerPolicy {
	out := assay.BreakerPolicy{
		ConsecutiveFailures: d.count(path+"consecutiveFailures", b.ConsecutiveFailures, 1000),
		FailurePercent:      d.count(path+"failurePercent", b.FailurePercent, 100),
		SlowerThan:          d.off(path+"slowerThan", b.SlowerThan),
		SlowPercent:         d.count(path+"slowPercent", b.SlowPercent, 100),
		MinRequests:         d.count(path+"minRequests", b.MinRequests, math.MaxInt32),
		Interval:            d.some(path+"interval", b.Interval),
		BaseTime:            d.some(path+"baseTime", b.BaseTime),
		MaxTime:             d.some(path+"maxTime", b.MaxTime),
	}
	if base, most := out.BaseTime, out.MaxTime; base > 0 && most > 0 && base > most {
		d.at(path+"maxTime", "is shorter than baseTime (%v)", base)
	}
	return out
}

// targets reads the services that a policy is for, and that no other one is.
func (d *document) targets(refs []v1alpha1.TargetReference) (names []string) {
	if len(refs) == 0 {
		d.missing("spec.targetRefs", "name at least one Service")
	}
	if len(refs) > 16 {
		d.at("spec.targetRefs", "%d targets; 16 are supported", len(refs))
	}
	for i := range refs {
		path, r := fmt.Sprintf("spec.targetRefs[%d]", i), &refs[i]
		if r.Kind == "" {
			r.Kind = "Service"
		}
		if r.Group == "core" {
			r.Group = ""
		}
		switch {
		case r.Group != "" || r.Kind != "Service":
			d.at(path, "%s of group %q: want a Service", r.Kind, r.Group)
		case !assay.ValidName(r.Name):
			d.missing(path+".name", "want the name of a service in this namespace")
		case slices.Contains(names, r.Name):
			d.at(path, "%s is there already", r.Name)
		default:
			key := objectKey{"TrafficPolicy of Service", d.namespace, r.Name}
			if first := d.first[key]; first != nil && first != d {
				d.at(path, "Service %s/%s has a policy already, %s at %s:%d", d.namespace, r.Name, first.meta.Name, first.tree.file, first.line(""))
				continue
			}
			d.first[key] = d
			names = append(names, r.Name)
		}
	}
	slices.Sort(names)
	return names
}

func (d *document) policyRetry(s *v1alpha1.TrafficPolicySpec, out *assay.RetryPolicy) {
	if r := s.Retry; r != nil {
		out.Attempts = d.count("spec.retry.attempts", r.Attempts, 10)
		out.Backoff, out.Repeatable = d.some("spec.retry.backoff", r.Backoff), r.Repeatable
		for i, c := range r.Codes {
			path := fmt.Sprintf("spec.retry.codes[%d]", i)
			switch {
			case c < 400 || c > 599:
				d.missing(path, "want a status from 400 to 599")
			case slices.Contains(out.Codes, int(c)):
				d.at(path, "%d is there already", c)
			default:
				out.Codes = append(out.Codes, int(c))
			}
		}
		slices.Sort(out.Codes)
	}
	c := s.RetryConstraint
	if c == nil {
		return
	}
	if b := c.Budget; b != nil {
		out.BudgetPercent = d.count("spec.retryConstraint.budget.percent", b.Percent, 100)
		out.BudgetInterval = d.some("spec.retryConstraint.budget.interval", b.Interval)
	}
	if m := c.MinRetryRate; m != nil {
		n := d.count("spec.retryConstraint.minRetryRate.count", m.Count, 1_000_000)
		if each := d.some("spec.retryConstraint.minRetryRate.interval", m.Interval); each > 0 && n > 0 {
			n = max(int(float64(n)/each.Seconds()+0.5), 1)
		}
		out.MinPerSecond = n
	}
}

func (d *document) policyInbound(in *v1alpha1.Inbound, out *assay.InboundPolicy) {
	if in == nil {
		return
	}
	if r := in.RateLimit; r != nil {
		each := time.Second
		if r.Interval != nil {
			each = d.some("spec.inbound.rateLimit.interval", r.Interval)
		}
		if r.Requests < 1 {
			d.missing("spec.inbound.rateLimit.requests", "want a number over 0")
		} else if each > 0 {
			out.RateLimit, out.RateBurst = float64(r.Requests)/each.Seconds(), int(r.Requests)
		}
		if r.Burst != nil {
			out.RateBurst = d.bound("spec.inbound.rateLimit.burst", r.Burst)
		}
	}
	if c := in.Concurrency; c != nil {
		const path = "spec.inbound.concurrency."
		out.MaxDelay = d.off(path+"maxDelay", c.MaxDelay)
		out.MinConcurrency, out.MaxConcurrency = d.count(path+"min", c.Min, math.MaxInt32), d.bound(path+"max", c.Max)
		if out.MaxConcurrency > 0 && out.MinConcurrency > out.MaxConcurrency {
			d.at(path+"max", "is less than min (%d)", out.MinConcurrency)
		}
	}
	out.MaxConnections = d.bound("spec.inbound.maxConnections", in.MaxConnections)
}

// count reads a number up to most, in which 0 switches off: a negative number then.
func (d *document) count(path string, n *int32, most int32) int {
	switch {
	case n == nil:
		return 0
	case *n < 0 || *n > most:
		d.at(path, "want a number from 0 to %d", most)
		return 0
	case *n == 0:
		return -1
	}
	return int(*n)
}

// bound reads a number over 0.
func (d *document) bound(path string, n *int32) int {
	if n == nil {
		return 0
	}
	if *n < 1 {
		d.at(path, "want a number over 0; leave it out for no bound")
		return 0
	}
	return int(*n)
}

// off reads a duration in which 0 switches off: a negative one then. some reads one
// over 0.
func (d *document) off(path string, in *v1alpha1.Duration) time.Duration {
	v, ok := d.duration(path, in)
	if ok && v == 0 {
		return -1
	}
	return v
}

func (d *document) some(path string, in *v1alpha1.Duration) time.Duration {
	v, ok := d.duration(path, in)
	if ok && v == 0 {
		d.at(path, "want a duration over 0")
	}
	return v
}

func (d *document) duration(path string, in *v1alpha1.Duration) (time.Duration, bool) {
	if in == nil {
		return 0, false
	}
	v, err := time.ParseDuration(string(*in))
	if err != nil || !gatewayDuration.MatchString(string(*in)) || v > 24*time.Hour {
		d.at(path, "%q is not a duration such as 500ms, 10s or 1m30s, a day at most", *in)
		return 0, false
	}
	return v, true
}
