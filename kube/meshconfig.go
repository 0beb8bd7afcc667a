package kube

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"assay.dev"
	"assay.dev/kube/v1alpha1"
)

var meshConfigType = reflect.TypeFor[v1alpha1.MeshConfig]()

// maxExcluded keeps the exceptions of a namespace readable, and its rules short.
const maxExcluded = 128

// meshConfig reads an assay.dev/v1alpha1 MeshConfig.
func (d *document) meshConfig() {
	var in struct {
		Spec v1alpha1.MeshConfigSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	if d.meta.Name != v1alpha1.DefaultName {
		d.at("metadata.name", "a namespace has one MeshConfig, named %s", v1alpha1.DefaultName)
		return
	}
	out := assay.NamespaceConfig{Namespace: d.namespace, Mode: assay.Observe}
	switch mode := assay.Mode(in.Spec.Mode); mode {
	case assay.Observe, assay.Strict:
		out.Mode = mode
	case "":
	default:
		d.at("spec.mode", "%q: want observe or strict", in.Spec.Mode)
	}
	switch mode := assay.Mode(in.Spec.Egress); mode {
	case assay.Observe, assay.Strict, "":
		out.Egress = mode
	default:
		d.at("spec.egress", "%q: want observe or strict", in.Spec.Egress)
	}
	for i, p := range in.Spec.ExcludedPorts {
		path := fmt.Sprintf("spec.excludedPorts[%d]", i)
		switch {
		case !validPort(p):
			d.missing(path, "want a number from 1 to 65535")
		case slices.Contains(out.ExcludedPorts, uint16(p)):
			d.at(path, "%d is there already", p)
		default:
			out.ExcludedPorts = append(out.ExcludedPorts, uint16(p))
		}
	}
	if len(in.Spec.ExcludedPorts) > maxExcluded {
		d.at("spec.excludedPorts", "%d ports; %d are supported", len(in.Spec.ExcludedPorts), maxExcluded)
	}
	slices.Sort(out.ExcludedPorts)
	if in.Spec.AccessLog != "" {
		var ok bool
		if out.AccessLog, ok = share(in.Spec.AccessLog); !ok {
			d.at("spec.accessLog", "%q: want a share from 0%% to 100%%, in steps of 0.0001%%", in.Spec.AccessLog)
		}
	}
	out.Traces = in.Spec.Traces
	kept := v1alpha1.MeshConfigSpec{Mode: string(out.Mode), Egress: string(out.Egress), AccessLog: in.Spec.AccessLog, Traces: in.Spec.Traces}
	for _, p := range out.ExcludedPorts {
		kept.ExcludedPorts = append(kept.ExcludedPorts, int32(p))
	}
	d.intent.Namespaces = append(d.intent.Namespaces, out)
	d.keep(kept)
}

// heldModes is what holds of a MeshConfig that cannot be understood: its modes, and strict where
// it says something else than what there is. A slip beside them, or a field that only a later
// release knows, must not open a namespace.
func heldModes(object map[string]any) []assay.NamespaceConfig {
	metadata, _ := object["metadata"].(map[string]any)
	namespace, _ := metadata["namespace"].(string)
	if object["kind"] != meshConfigType.Name() || metadata["name"] != v1alpha1.DefaultName || namespace == "" {
		return nil
	}
	spec, readable := object["spec"].(map[string]any)
	readable = readable || object["spec"] == nil
	mode := func(field string) assay.Mode {
		if v := spec[field]; readable && (v == nil || v == "" || v == string(assay.Observe)) {
			return assay.Observe
		}
		return assay.Strict
	}
	return []assay.NamespaceConfig{{Namespace: namespace, Mode: mode("mode"), Egress: mode("egress")}}
}

// share reads a percentage as parts per million.
func share(s string) (ppm int, ok bool) {
	number, ok := strings.CutSuffix(s, "%")
	if !ok || strings.Trim(number, "0123456789.") != "" {
		return 0, false
	}
	v, err := strconv.ParseFloat(number, 64)
	ppm = int(v*10_000 + 0.5)
	return ppm, err == nil && v <= 100 && (v == 0 || ppm > 0)
}
