package assay_test

import (
	"encoding/json"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "assay.dev"

// layers is the import order: a package may import packages of its own row's
// list, and everything below its own folder. What is not listed is forbidden; the
// reason says what would be lost.
var layers = []struct {
	folder string // a package or everything under it
	may    []string
	reason string
}{
	{"", nil, "the nouns are shared by every part, so they depend on none"},
	{"internal", nil, "what is of use to several parts knows none of them"},
	{"link", []string{""}, "what agent and proxy share must pull neither into the other"},
	{"api", []string{""}, "what agent and control share must pull neither into the other"},
	{"proxy", []string{"", "link", "internal"}, "the data plane never calls control, reads a store or knows Kubernetes: its path must be readable in an hour"},
	{"store", []string{""}, "state knows no policy"},
	{"identity", []string{"", "store"}, "the CA must not depend on who asks"},
	{"discovery", []string{""}, "a pure function from intent and facts to a snapshot"},
	{"kube", []string{"", "discovery"}, "a translator into our nouns; nothing that works without Kubernetes may need it"},
	{"control", []string{"", "api", "store", "identity", "discovery"}, "control and agent meet through api only, so that either can be another process"},
	{"agent", []string{"", "api", "link", "internal"}, "an agent holds no state of the mesh's and no CA"},
	{"demo", []string{"", "api"}, "the demo sees what any operator sees"},
	{"cmd/assay-proxy", []string{"", "link", "proxy"}, "the data plane alone"},
	{"cmd/assay", []string{"", "link", "api", "store", "identity", "discovery", "kube", "control", "agent", "demo"}, "wires every role but the data plane, which is another process"},
	{"bench/scale", []string{"", "api", "agent"}, "its agents speak as the agent's own client does; control is another process"},
	{"bench", []string{"", "api", "link", "proxy", "test/lab"}, "measures from outside, in the tests' lab"},
	{"test", []string{"", "api", "link", "proxy", "identity", "store", "discovery", "kube", "control", "agent"}, "tests may look at everything"},
}

// exclusive lists modules that only some folders may import.
var exclusive = []struct {
	prefix  string
	folders []string
	reason  string
}{
	{"k8s.io/", []string{"kube", "bench/scale"}, "Kubernetes' types must not leak into what runs without it; bench/scale is an API server"},
	{"sigs.k8s.io/", []string{"kube", "cmd/assay"}, "as k8s.io; YAML output of the CLI excepted"},
	{"github.com/containernetworking/", []string{"kube"}, "network plugins are Kubernetes' way in"},
	{"github.com/containerd/", []string{"kube"}, "as containernetworking"},
	{"modernc.org/sqlite", []string{"store"}, "one door to the database"},
	{"github.com/jackc/pgx", []string{"store"}, "one door to the database"},
	{"database/sql", []string{"store"}, "one door to the database"},
	{"google.golang.org/grpc", []string{"api", "control", "agent", "cmd/assay", "kube", "test", "bench", "demo"}, "gRPC is for hosts, operators and container runtimes, never for the data plane"},
	{"github.com/google/nftables", []string{"agent", "proxy", "test"}, "only the agent writes rules (the proxy's tests do too)"},
	{"github.com/mdlayher/netlink", []string{"agent"}, "as nftables"},
	{"github.com/vishvananda/netlink", []string{"agent", "proxy", "test", "bench", "cmd/assay", "demo"}, "only the agent makes links"},
	{"net/http", []string{"agent", "cmd/assay", "test", "bench", "demo", "control", "kube/inject"}, "the data plane has engines of its own; a scrape endpoint and a webhook have not"},
	{"github.com/spf13/cobra", []string{"cmd/assay"}, "parts are libraries"},
}

type listed struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
	Module     *struct{ Path string }
}

func goList(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,GoFiles,Imports,Module"}, args...)...)
	cmd.Env = append(os.Environ(), "GOOS=linux")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p listed
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

func inside(folder, pkg string) bool {
	return pkg == folder || folder != "" && strings.HasPrefix(pkg, folder+"/")
}

// TestImportsGoDown holds the order of the parts.
func TestImportsGoDown(t *testing.T) {
	for _, p := range goList(t, "./...") {
		pkg := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		i := slices.IndexFunc(layers, func(l struct {
			folder string
			may    []string
			reason string
		}) bool {
			return inside(l.folder, pkg)
		})
		if i < 0 {
			t.Errorf("%s: not in the table of parts: give it a row with a reason", p.ImportPath)
			continue
		}
		row := layers[i]
		for _, imp := range p.Imports {
			rest, ours := strings.CutPrefix(imp, module)
			if !ours {
				if pkg == "" && strings.Contains(strings.SplitN(imp, "/", 2)[0], ".") {
					t.Errorf("the root package imports %s: it imports only the standard library", imp)
				}
				continue
			}
			target := strings.TrimPrefix(rest, "/")
			ok := row.folder != "" && inside(row.folder, target)
			for _, may := range row.may {
				ok = ok || inside(may, target)
			}
			if !ok {
				t.Errorf("%s imports %s: %s", p.ImportPath, imp, row.reason)
			}
		}
	}
}

// TestExclusiveImports holds who may know which technology.
func TestExclusiveImports(t *testing.T) {
	for _, p := range goList(t, "./...") {
		pkg := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		for _, imp := range p.Imports {
			for _, x := range exclusive {
				if imp != strings.TrimSuffix(x.prefix, "/") && !strings.HasPrefix(imp, strings.TrimSuffix(x.prefix, "/")+"/") {
					continue
				}
				if !slices.ContainsFunc(x.folders, func(f string) bool { return inside(f, pkg) }) {
					t.Errorf("%s imports %s: only %s may: %s", p.ImportPath, imp, strings.Join(x.folders, ", "), x.reason)
				}
			}
		}
	}
}

// TestPackagesAreDescribed wants a doc comment on every package.
func TestPackagesAreDescribed(t *testing.T) {
	for _, p := range goList(t, "./...") {
		described := len(p.GoFiles) == 0
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			described = described || f.Doc != nil && len(f.Doc.Text()) > 60
		}
		if !described {
			t.Errorf("%s: no package comment: say what it is for, what it refuses to do, and where to begin reading", p.ImportPath)
		}
	}
}

// TestDependenciesHaveReasons wants each direct dependency in docs/dependencies.md.
func TestDependenciesHaveReasons(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, m := range regexp.MustCompile(`(?m)^(?:require )?\s+?(\S+\.\S+) v\S+$`).FindAllStringSubmatch(string(mod), -1) {
		direct = append(direct, m[1])
		if !strings.Contains(string(doc), "`"+m[1]+"`") {
			t.Errorf("go.mod requires %s: docs/dependencies.md has no reason for it", m[1])
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\S+)`").FindAllStringSubmatch(string(doc), -1) {
		if !slices.Contains(direct, m[1]) {
			t.Errorf("docs/dependencies.md lists %s, which go.mod does not require directly", m[1])
		}
	}
}
