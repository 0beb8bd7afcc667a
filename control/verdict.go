package control

import (
	"encoding/json"
	"strings"

	"assay.dev/store"
)

// Verdict is what became of an object that people declared to the platform, for the platform to
// show.
type Verdict struct {
	Generation int64 // of the object that it is about
	Accepted   bool  // it has an effect
	Reason     string
	Message    string // what is wrong, and what would mend it
}

// remedies are by Unsound.Reason. What makes an object invalid says itself what is wanted instead.
var remedies = map[string]string{
	"Invalid":       "it has no effect until that is corrected",
	"Conflicted":    "it has no effect: delete one of the two, or take out of one what both say",
	"LimitExceeded": "it has no effect: put several rules into one, or delete some",
}

// Verdict returns what became of an object, and whether that is known. It is for Assay's own
// kinds; what became of a route says RouteStatus.
func (c *Control) Verdict(key store.Key) (Verdict, bool) {
	o, ok := c.intent.get(key)
	if _, broken := c.intent.status(); !ok || broken != nil {
		return Verdict{}, false // as a whole it is not in effect, which Check says
	}
	v := Verdict{Generation: o.Generation, Accepted: true, Reason: "Accepted"}
	if problem, ok := c.intent.unsound()[key]; ok {
		v.Accepted, v.Reason, v.Message = false, problem.Reason, problem.Text
		remedy := remedies[problem.Reason]
		if o.Kind == "MeshConfig" && problem.Reason == "Invalid" {
			remedy = "of it only mode and egress are in effect until that is corrected"
		}
		if remedy != "" {
			v.Message += " (" + remedy + ")"
		}
		return v, true
	}
	if o.Kind != "TrafficPolicy" {
		return v, true
	}
	found, missing := c.model.targets(o.Namespace, o.Spec)
	if len(missing) > 0 {
		v.Message = "there is no Service " + strings.Join(missing, ", ")
		if found > 0 {
			v.Message += " (it is in effect for the others; make the Service, or correct targetRefs)"
		} else {
			v.Accepted, v.Reason = false, "TargetNotFound"
			v.Message += " (it has no effect: make the Service, or correct targetRefs)"
		}
	}
	return v, true
}

// targets returns how many services of a traffic policy there are, and which are not.
func (m *model) targets(namespace string, manifest json.RawMessage) (found int, missing []string) {
	var p struct {
		Spec struct {
			TargetRefs []struct{ Name string } `json:"targetRefs"`
		} `json:"spec"`
	}
	if json.Unmarshal(manifest, &p) != nil {
		return 0, nil
	}
	for _, t := range p.Spec.TargetRefs {
		if key := namespace + "/" + t.Name; m.hasService(key) {
			found++
		} else {
			missing = append(missing, key)
		}
	}
	return found, missing
}
