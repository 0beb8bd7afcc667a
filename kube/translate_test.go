package kube

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"assay.dev"
	"assay.dev/discovery"
)

var update = flag.Bool("update", false, "write what is, instead of comparing")

// Each archive in testdata holds files of intent and, last, "want": every problem,
// or what the files mean.
func TestTranslate(t *testing.T) {
	archives, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(archives) < 5 {
		t.Fatalf("%d archives: %v", len(archives), err)
	}
	for _, path := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			files, want := inputs(a)
			got := describe(Translate(files))
			if *update {
				a.Files = append(a.Files[:len(files)], txtar.File{Name: "want", Data: []byte(got)})
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != want {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

func inputs(a *txtar.Archive) (files []discovery.File, want string) {
	for _, f := range a.Files {
		if f.Name == "want" {
			want = string(f.Data)
			continue
		}
		files = append(files, discovery.File{Name: f.Name, YAML: f.Data})
	}
	return files, want
}

func describe(intent discovery.Intent, objects []discovery.Object, err error) string {
	var b strings.Builder
	if err != nil {
		return err.Error() + "\n"
	}
	for _, o := range objects {
		fmt.Fprintf(&b, "%s:%d: %s %s/%s\n  %s\n", o.Source, o.Line, o.Kind, o.Namespace, o.Name, o.Manifest)
	}
	for _, s := range intent.Services {
		fmt.Fprintf(&b, "service %s selector=%v headless=%v\n", s.Key(), s.Selector, s.Headless)
		for _, p := range s.Ports {
			fmt.Fprintf(&b, "  port %d name=%q target=%d protocol=%q%s\n", p.Port.Port, p.Name, p.Target, p.Protocol, announced(p))
		}
	}
	for _, n := range intent.Namespaces {
		fmt.Fprintf(&b, "namespace %s %s excluded=%v egress=%q\n", n.Namespace, n.Mode, n.ExcludedPorts, n.Egress)
	}
	for _, e := range intent.Egress {
		fmt.Fprintf(&b, "egress %s/%s accounts=%q hosts=%q addresses=%v ports=%v\n", e.Namespace, e.Name, e.Accounts, e.Hosts, e.Addresses, e.Ports)
	}
	for _, r := range intent.Routes {
		describeRoute(&b, &r)
	}
	for _, g := range intent.Grants {
		fmt.Fprintf(&b, "grant %s/%s from=%v to=%q\n", g.Namespace, g.Name, g.From, g.To)
	}
	for _, p := range intent.Policies {
		fmt.Fprintf(&b, "policy %+v\n", p)
	}
	return b.String()
}

// checkTranslation holds for whatever the files are; TestTranslate's inputs seed it.
func checkTranslation(t *testing.T, files []discovery.File) {
	intent, objects, err := Translate(files)
	if err != nil {
		if intent.Services != nil || intent.Namespaces != nil || intent.Routes != nil || objects != nil {
			t.Fatal("an error and a result")
		}
		problems, ok := errors.AsType[Problems](err)
		if !ok || len(problems) == 0 || assay.KindOf(err) != assay.Invalid {
			t.Fatalf("error %v: want kind invalid and problems", err)
		}
		for _, p := range problems {
			known := false
			for _, f := range files {
				known = known || f.Name == p.File && p.Line <= strings.Count(string(f.YAML), "\n")+strings.Count(string(f.YAML), "\r")+strings.Count(string(f.YAML), "\u0085")+strings.Count(string(f.YAML), "\u2028")+strings.Count(string(f.YAML), "\u2029")+1
			}
			if !known || p.Line < 1 || p.Text == "" {
				t.Fatalf("a problem nowhere: %+v", p)
			}
		}
		return
	}
	if err := intent.Validate(); err != nil {
		t.Fatal(err)
	}
	if len(objects) != len(intent.Services)+len(intent.Namespaces)+len(intent.Routes)+len(intent.Grants)+len(intent.Egress)+len(intent.Policies) {
		t.Fatalf("%d objects, %d services, %d namespaces, %d routes, %d grants", len(objects), len(intent.Services), len(intent.Namespaces), len(intent.Routes), len(intent.Grants))
	}
	// What is stored means the same, and is in its normal form already.
	var again []discovery.File
	for i, o := range objects {
		if !json.Valid(o.Manifest) {
			t.Fatalf("not JSON: %s", o.Manifest)
		}
		again = append(again, discovery.File{Name: fmt.Sprint(i), YAML: o.Manifest})
	}
	intent2, objects2, err := Translate(again)
	if err != nil {
		t.Fatalf("the normal form is refused: %v", err)
	}
	if !reflect.DeepEqual(intent, intent2) {
		t.Fatalf("the normal form means something else:\n%+v\n%+v", intent, intent2)
	}
	for i, o := range objects2 {
		if string(o.Manifest) != string(objects[i].Manifest) {
			t.Fatalf("the normal form has another one:\n%s\n%s", objects[i].Manifest, o.Manifest)
		}
	}
}

func FuzzManifest(f *testing.F) {
	archives, _ := filepath.Glob("testdata/*.txtar")
	for _, path := range archives {
		a, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		files, _ := inputs(a)
		for _, file := range files {
			f.Add(file.YAML)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		checkTranslation(t, []discovery.File{{Name: "a.yaml", YAML: text}})
	})
}

func TestBounds(t *testing.T) {
	for name, text := range map[string]string{
		"large":  strings.Repeat("# comment\n", maxFile/10+1),
		"deep":   "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: " + strings.Repeat("[", 5000),
		"laughs": "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nkind: Service\napiVersion: v1\nmetadata: {labels: *b}",
	} {
		_, _, err := Translate([]discovery.File{{Name: name, YAML: []byte(text)}})
		if assay.KindOf(err) != assay.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	var many strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&many, "x%d: 1\n", i)
	}
	_, _, err := Translate([]discovery.File{{Name: "many", YAML: []byte("kind: Service\napiVersion: v1\n" + many.String())}})
	if lines := strings.Count(err.Error(), "\n"); lines != maxProblems+1 || !strings.Contains(err.Error(), "and 801 more") {
		t.Errorf("%d lines: …%s", lines, err.Error()[len(err.Error())-80:])
	}
}

func TestProtocol(t *testing.T) {
	for name, want := range map[string]assay.Protocol{
		"http": assay.HTTP1, "HTTP": assay.HTTP1, "kubernetes.io/ws": assay.HTTP1, "kubernetes.io/h2c": assay.HTTP2, "grpc": assay.HTTP2,
		"https": assay.TLS, "tls": assay.TLS, "kubernetes.io/wss": assay.TLS, "tcp": assay.Opaque, "postgresql": assay.Opaque,
		"ipp": assay.Detect, "mycompany.com/own": assay.Detect,
	} {
		if got, err := Protocol(name); err != nil || got != want {
			t.Errorf("Protocol(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"", "two words", "a/b/c", "-x"} {
		if _, err := Protocol(name); err == nil {
			t.Errorf("Protocol(%q) is accepted", name)
		}
	}
}

func announced(p discovery.DeclaredPort) (text string) {
	if p.ProxyProtocol {
		text += " proxy-protocol"
	}
	if p.ForwardClientCert {
		text += " forward-client-cert"
	}
	return text
}
