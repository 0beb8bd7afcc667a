package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"assay.dev"
	"assay.dev/api"
)

var objectColumns = []column[api.ObjectView]{
	col("NAMESPACE", func(o api.ObjectView) string { return o.Namespace }),
	col("NAME", func(o api.ObjectView) string { return o.Name }),
	col("SOURCE", func(o api.ObjectView) string { return o.Source }),
	col("IN EFFECT", func(o api.ObjectView) string { return yesNo(o.Status.InEffect) }),
	timed("CHANGED", func(o api.ObjectView, now time.Time) string { return age(now, o.Changed) }),
	wide("GENERATION", func(o api.ObjectView) string { return strconv.FormatInt(o.Generation, 10) }),
	wide("PROBLEM", func(o api.ObjectView) string { return o.Status.Problem }),
}

var routeColumns = []column[api.ObjectView]{
	col("NAMESPACE", func(o api.ObjectView) string { return o.Namespace }),
	col("NAME", func(o api.ObjectView) string { return o.Name }),
	col("PARENTS", func(o api.ObjectView) string {
		return join(o.Status.Parents, func(p assay.RouteParentStatus) string { return parentName(o.Namespace, p.ParentRef) })
	}),
	col("ACCEPTED", func(o api.ObjectView) string { return conditionText(o, "Accepted") }),
	col("RESOLVED", func(o api.ObjectView) string { return conditionText(o, "ResolvedRefs") }),
	timed("CHANGED", func(o api.ObjectView, now time.Time) string { return age(now, o.Changed) }),
	wide("RULES", func(o api.ObjectView) string { return strconv.Itoa(len(routeSpec(o).Rules)) }),
	wide("SOURCE", func(o api.ObjectView) string { return o.Source }),
	wide("GENERATION", func(o api.ObjectView) string { return strconv.FormatInt(o.Generation, 10) }),
	wide("PROBLEM", func(o api.ObjectView) string { return o.Status.Problem }),
}

// parentName is a parent as short as it can be said in a namespace.
func parentName(namespace string, p assay.RouteParentRef) string {
	s := p.Name
	if p.Namespace != namespace {
		s = p.Namespace + "/" + s
	}
	if p.Kind != "Service" {
		s = p.Kind + " " + s
	}
	if p.Port != 0 {
		s += ":" + strconv.Itoa(int(p.Port))
	}
	if p.SectionName != "" {
		s += ":" + p.SectionName
	}
	return s
}

// conditionText says yes when the condition holds at every parent, or why not at the
// first where it does not, with how many others take the route.
func conditionText(o api.ObjectView, kind string) string {
	yes, no := 0, ""
	for _, p := range o.Status.Parents {
		for _, c := range p.Conditions {
			switch {
			case c.Type == "PartiallyInvalid" && kind == "Accepted":
				if no == "" {
					no = "in part: " + c.Reason
				}
			case c.Type != kind:
			case c.Status == "True":
				yes++
			case no == "":
				no = "no: " + c.Reason
			}
		}
	}
	switch {
	case no == "" && yes == 0:
		return ""
	case no == "":
		return "yes"
	case yes > 0 && strings.HasPrefix(no, "no"):
		return fmt.Sprintf("%d of %d, else %s", yes, len(o.Status.Parents), no)
	}
	return no
}

type routeRules struct {
	Rules []json.RawMessage `json:"rules"`
}

func routeSpec(o api.ObjectView) routeRules {
	var m struct {
		Spec routeRules `json:"spec"`
	}
	_ = json.Unmarshal(o.Manifest, &m) // what cannot be read is shown as none
	return m.Spec
}

// describeRoute writes a route with its conditions, as a person asks for them when it
// does not do what it should.
func describeRoute(w io.Writer, o api.ObjectView, now time.Time) error {
	writeFields(w, []field{
		{o.Kind, o.Namespace + "/" + o.Name}, {"Source", o.Source}, {"Generation", strconv.FormatInt(o.Generation, 10)},
		{"In effect", yesNo(o.Status.InEffect)}, {"Problem", o.Status.Problem}, {"Created", stamp(o.Created)}, {"Changed", stamp(o.Changed)},
	})
	for _, p := range o.Status.Parents {
		err := section(w, "Parent "+p.ParentRef.String(), []column[assay.RouteCondition]{
			col("CONDITION", func(c assay.RouteCondition) string { return c.Type }),
			col("STATUS", func(c assay.RouteCondition) string { return c.Status }),
			col("REASON", func(c assay.RouteCondition) string { return c.Reason }),
			timed("SINCE", func(c assay.RouteCondition, now time.Time) string { return age(now, c.LastTransitionTime) }),
			col("MESSAGE", func(c assay.RouteCondition) string { return c.Message }),
		}, p.Conditions, now)
		if err != nil {
			return err
		}
	}
	var m struct {
		Spec json.RawMessage `json:"spec"`
	}
	if err := json.Unmarshal(o.Manifest, &m); err != nil {
		return &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err}
	}
	text, err := yaml.JSONToYAML(m.Spec)
	if err != nil {
		return &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err}
	}
	fmt.Fprintln(w, "Spec:")
	for line := range bytes.Lines(text) {
		fmt.Fprintf(w, "  %s", line)
	}
	return nil
}
