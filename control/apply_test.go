package control

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/kube"
)

const (
	paymentsYAML = `apiVersion: v1
kind: Service
metadata: {name: payments, namespace: bank}
spec:
  selector: {app: payments}
  ports: [{port: 80, targetPort: 8080}]
`
	strictYAML = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: bank}
spec: {mode: strict}
`
)

func withIntent(cfg *Config) { cfg.Translate = kube.Translate }

func files(list ...string) []*api.File {
	var out []*api.File
	for i := 0; i < len(list); i += 2 {
		out = append(out, &api.File{Name: list[i], Yaml: []byte(list[i+1])})
	}
	return out
}

func apply(t *testing.T, o api.OperatorClient, req *api.ApplyRequest) (string, error) {
	t.Helper()
	resp, err := o.Apply(t.Context(), req)
	if err != nil {
		return "", api.StatusError("apply", err)
	}
	var out []string
	for _, ch := range resp.Changes {
		out = append(out, ch.Kind+" "+ch.Namespace+"/"+ch.Name+" "+ch.Action)
	}
	return strings.Join(out, ", "), nil
}

func TestApply(t *testing.T) {
	r := start(t, withIntent)
	o := r.operator(t)
	a := syncHost(t, localHosts(t, r), nil)
	w := a.workload("w1", "bank", "", 1, 8080)
	w.Labels = map[string]string{"app": "payments"}
	a.up(w)
	a.waitAccepted("w1")

	step := func(want string, req *api.ApplyRequest) {
		t.Helper()
		got, err := apply(t, o, req)
		if err != nil || got != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	both := files("a.yaml", paymentsYAML, "b.yaml", strictYAML)
	step("MeshConfig bank/default created, Service bank/payments created", &api.ApplyRequest{Files: both, DryRun: true})
	if a.get("service/bank/payments") != nil {
		t.Error("a dry run changed something")
	}
	step("MeshConfig bank/default created, Service bank/payments created", &api.ApplyRequest{Files: both})
	svc := a.waitFor("service/bank/payments").GetService()
	if len(svc.Endpoints) != 1 || svc.Endpoints[0].Targets[0] != 8080 || svc.Ports[0].Port != 80 {
		t.Errorf("service: %v", svc)
	}
	eventually(t, "strict", func() bool { return a.get("namespace/bank").GetNamespace().GetMode() == "strict" })
	step("MeshConfig bank/default unchanged, Service bank/payments unchanged", &api.ApplyRequest{Files: both})
	step("MeshConfig bank/default changed", &api.ApplyRequest{Files: files("b.yaml", strings.Replace(strictYAML, "strict", "observe", 1))})
	eventually(t, "observe", func() bool { return a.get("namespace/bank").GetNamespace().GetMode() == "observe" })

	// A bad file changes nothing, whatever else is with it.
	_, err := apply(t, o, &api.ApplyRequest{Files: files("b.yaml", strictYAML, "bad.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: bank}\nspec: {portz: []}\n")})
	if assay.KindOf(err) != assay.Invalid || !strings.Contains(err.Error(), "bad.yaml:4") {
		t.Errorf("bad file: %v", err)
	}
	if got := documents[api.ObjectView](t, o, "meshconfigs"); len(got) != 1 || !strings.Contains(string(got[0].Manifest), "observe") || got[0].Generation != 2 || !got[0].Status.InEffect {
		t.Errorf("meshconfigs: %s", show(got))
	}

	// It survives a restart.
	a.close()
	r = r.restart(nil)
	o = r.operator(t)
	if got := documents[api.ServiceView](t, o, "services"); len(got) != 1 || !got[0].Declared || got[0].Ports[0].Port != 80 {
		t.Errorf("after a restart: %s", show(got))
	}
	step("MeshConfig bank/default removed, Service bank/payments unchanged", &api.ApplyRequest{Files: files("a.yaml", paymentsYAML), Prune: true})
	if _, err := o.Delete(t.Context(), &api.DeleteRequest{Kind: "Service", Namespace: "bank", Name: "payments"}); err != nil {
		t.Error(err)
	}
	if _, err := o.Delete(t.Context(), &api.DeleteRequest{Kind: "Service", Namespace: "bank", Name: "payments"}); assay.KindOf(api.StatusError("delete", err)) != assay.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if got := documents[api.ServiceView](t, o, "services"); len(got) != 0 {
		t.Errorf("after delete: %s", show(got))
	}
}

// TestFolder: a folder is applied as a whole and on its own; a bad file leaves the
// last good state and says so.
func TestFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		// As editors and mounts do it: written beside, then renamed.
		tmp := filepath.Join(dir, ".tmp")
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write("bank/payments.yaml", paymentsYAML)
	write("README.txt", "not intent")
	r := start(t, func(cfg *Config) { withIntent(cfg); cfg.Intent = dir })
	o := r.operator(t)
	mode := func() string {
		for _, n := range documents[api.NamespaceView](t, o, "namespaces") {
			if n.Namespace == "bank" {
				return string(n.Mode)
			}
		}
		return ""
	}
	problem := func() string {
		resp, err := o.Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "intent-not-in-effect" })
		if i < 0 {
			return ""
		}
		return resp.Findings[i].Detail
	}
	eventually(t, "the service", func() bool { return len(documents[api.ServiceView](t, o, "services")) == 1 })
	write("bank/mesh.yaml", strictYAML)
	eventually(t, "strict", func() bool { return mode() == "strict" })
	write("bank/mesh.yaml", strings.Replace(strictYAML, "strict", "stricter", 1))
	eventually(t, "the problem is shown", func() bool { return strings.Contains(problem(), "mesh.yaml") })
	if mode() != "strict" || len(documents[api.ServiceView](t, o, "services")) != 1 {
		t.Error("the last good state is not in effect")
	}
	if got := documents[api.ObjectView](t, o, "meshconfigs"); got[0].Status.Problem == "" {
		t.Errorf("meshconfigs: %s", show(got))
	}
	// The folder's objects are the folder's.
	if _, err := apply(t, o, &api.ApplyRequest{Files: files("x.yaml", strictYAML), DryRun: true}); assay.KindOf(err) != assay.Conflict {
		t.Errorf("a dry run over the folder: %v", err)
	}
	if _, err := apply(t, o, &api.ApplyRequest{Files: files("x.yaml", strictYAML)}); assay.KindOf(err) != assay.Conflict || !strings.Contains(err.Error(), "folder") {
		t.Errorf("applied over the folder: %v", err)
	}
	if _, err := o.Delete(t.Context(), &api.DeleteRequest{Kind: "MeshConfig", Namespace: "bank", Name: "default"}); assay.KindOf(api.StatusError("delete", err)) != assay.Conflict {
		t.Errorf("deleted beneath the folder: %v", err)
	}
	other := strings.Replace(paymentsYAML, "payments, n", "ledger, n", 1)
	if got, err := apply(t, o, &api.ApplyRequest{Files: files("x.yaml", other), Prune: true}); err != nil || got != "Service bank/ledger created" {
		t.Errorf("beside the folder: %q, %v", got, err)
	}
	if err := os.Remove(filepath.Join(dir, "bank/mesh.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all good", func() bool { return problem() == "" && mode() != "strict" })
	if got := documents[api.ServiceView](t, o, "services"); len(got) != 2 {
		t.Errorf("services: %s", show(got))
	}
	// A folder that vanishes takes nothing with it.
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the problem is shown", func() bool { return problem() != "" })
	if got := documents[api.ServiceView](t, o, "services"); len(got) != 2 {
		t.Errorf("services without the folder: %s", show(got))
	}
}

// TestFolderFromTheStart: a good folder is in effect before anybody can ask; of a bad
// one control says what is in effect instead.
func TestFolderFromTheStart(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "mesh.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	bad := strings.Replace(strictYAML, "strict", "stricter", 1)
	write(bad)
	r := start(t, func(cfg *Config) { withIntent(cfg); cfg.Intent = dir })
	state := func(want ...string) {
		t.Helper()
		resp, err := r.operator(t).Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, f := range resp.Findings {
			if f.Kind == "intent-not-in-effect" {
				got = f.Detail + " / " + f.Remedy
			}
		}
		problem := r.IntentProblem()
		if (problem != nil) != (got != "") {
			t.Errorf("check says %q, IntentProblem %v", got, problem)
		}
		for _, w := range want {
			if !strings.Contains(got, w) || !strings.Contains(problem.Error(), w) {
				t.Errorf("no %q in %q and %v", w, got, problem)
			}
		}
		if len(want) == 0 && got != "" {
			t.Errorf("unexpected: %s", got)
		}
	}
	strict := func() bool {
		for _, n := range documents[api.NamespaceView](t, r.operator(t), "namespaces") {
			if n.Namespace == "bank" && n.Mode == assay.Strict {
				return true
			}
		}
		return false
	}
	state("mesh.yaml", "nothing of it ever was")
	write(strictYAML)
	r = r.restart(nil)
	state()
	if !strict() {
		t.Error("the folder was not in effect from the start")
	}
	write(bad)
	r = r.restart(nil)
	state("mesh.yaml", "the last good state is in effect")
	if !strict() {
		t.Error("the last good state is not in effect")
	}
}

func TestApplyWithoutTranslator(t *testing.T) {
	r := start(t, nil)
	if _, err := apply(t, r.operator(t), &api.ApplyRequest{}); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("got %v", err)
	}
}
