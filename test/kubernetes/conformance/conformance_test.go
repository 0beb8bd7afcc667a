package conformance_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev/test/kubernetes"
)

func TestMain(m *testing.M) { kubernetes.Main(m) }

var (
	report = flag.String("report", "", "where the report goes; nowhere without")
	only   = flag.String("only", "", "the short name of the one test to run")
)

// extended are the features beyond the core that the suite knows of a mesh.
var extended = []string{
	"MeshClusterIPMatching", "MeshConsumerRoute", "MeshHTTPRouteBackendRequestHeaderModification", "MeshHTTPRouteNamedRouteRule",
	"MeshHTTPRouteQueryParamMatching", "MeshHTTPRouteRedirectPath", "MeshHTTPRouteRedirectPort", "MeshHTTPRouteRewritePath", "MeshHTTPRouteSchemeRedirect",
}

// besides are features of routes that are no mesh's in particular, and that tests of a mesh want.
var besides = []string{
	"HTTPRouteResponseHeaderModification", "HTTPRouteParentRefPort", "HTTPRoute303RedirectStatusCode", "HTTPRoute307RedirectStatusCode", "HTTPRoute308RedirectStatusCode",
}

// TestConformance passes when every test of both profiles does. The suite passes by a test of a
// feature that it is not told of, and its report does not say so: here none is left out.
func TestConformance(t *testing.T) {
	kubernetes.Require(t)
	work := t.TempDir()
	suite, api := filepath.Join(work, "suite"), moduleFolder(t, "suite", "sigs.k8s.io/gateway-api")
	golang(t, "suite", "test", "-c", "-o", suite, ".")
	echo := filepath.Join(work, "echo")
	golang(t, "echo", "build", "-trimpath", "-o", echo+string(filepath.Separator), "tool")

	c := kubernetes.Up(t, 1)
	c.Kubectl(t, "apply", "--server-side", "-f", filepath.Join(api, "config", "crd", "standard"))
	cert, key := certificate(t)
	for _, name := range imagesOf(t, moduleFolder(t, "suite", "sigs.k8s.io/gateway-api/conformance")) {
		c.Import(t, kubernetes.Image{
			Name: name,
			Files: map[string]kubernetes.File{
				"/usr/local/bin/server": {From: filepath.Join(echo, "server")},
				"/usr/local/bin/client": {From: filepath.Join(echo, "client")},
				"/cert.crt":             {Text: cert},
				"/cert.key":             {Text: key},
			},
			Entrypoint: []string{"/usr/local/bin/server"},
			Env:        []string{"PATH=/usr/local/bin"},
		})
	}
	assay := mesh(t, c)

	args := []string{
		"-test.v", "-test.timeout=30m", "--cleanup-base-resources=false", "--conformance-profiles=MESH-HTTP,MESH-GRPC", "--namespace-labels=assay.dev/mesh=enabled",
		"--supported-features=Mesh,HTTPRoute,GRPCRoute," + strings.Join(append(extended, besides...), ","),
		"--organization=assay", "--project=assay", "--url=https://assay.dev", "--version=" + version(t), "--contact=SECURITY.md",
	}
	if *report != "" {
		file, err := filepath.Abs(*report)
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--report-output="+file)
	}
	if *only != "" {
		args = append(args, "--run-test="+*only)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 31*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, suite, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	said := out.String()
	verdicts := regexp.MustCompile(`(?m)^ *--- (PASS|FAIL): .*$`).FindAllString(said, -1)
	t.Logf("%s", strings.Join(verdicts, "\n"))
	keep(t, "suite.txt", said)
	if err != nil {
		t.Errorf("the suite: %v\n%s", err, reasons(said))
	}
	if left := regexp.MustCompile(`(?m)^ *--- SKIP: \S*/Mesh.*$`).FindAllString(said, -1); len(left) > 0 && *only == "" {
		t.Errorf("left out:\n%s", strings.Join(left, "\n"))
	}
	edges := assay("edges")
	keep(t, "edges.txt", edges)
	encrypted(t, edges)
}

// keep writes what may be read later to a file; `go test -artifacts` says where.
func keep(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

// reasons are the tests of the suite that failed and have no part that did, each with the
// end of what it said; or the end of everything, if there are none.
func reasons(out string) string {
	var failed []string
	said := map[string][]string{}
	test := ""
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		switch {
		case len(fields) > 2 && fields[0] == "===":
			test = fields[2]
		case len(fields) > 2 && fields[0] == "---":
			test = ""
			if fields[1] == "FAIL:" {
				failed = append(failed, fields[2])
			}
		case len(fields) > 0:
			line = strings.TrimRight(line, "\n")
			said[test] = append(said[test], line[:min(len(line), 300)])
		}
	}
	var s strings.Builder
	for _, test := range failed {
		if slices.ContainsFunc(failed, func(other string) bool { return strings.HasPrefix(other, test+"/") }) {
			continue
		}
		lines := said[test]
		fmt.Fprintf(&s, "%s\n%s\n", test, strings.Join(lines[max(len(lines)-12, 0):], "\n"))
	}
	if s.Len() == 0 {
		return lastOf(out, 4000)
	}
	return s.String()
}

// carried are the ports of echo-v2 that the suite's routes send requests of echo-v1 to.
// Those to the service echo may all have stayed in echo-v1, which is an endpoint of it.
var carried = []string{"echo-v2:80", "echo-v2:7070", "echo-v2:8080"}

// encrypted: the suite looks at answers alone; what carried them was mutual TLS.
func encrypted(t *testing.T, edges string) {
	t.Helper()
	var under strings.Builder
	for _, edge := range regexp.MustCompile(`(?m)^gateway-conformance-mesh\S*/\S+ +.*gateway-conformance-mesh\S*/.*$`).FindAllString(edges, -1) {
		switch {
		case strings.Contains(edge, " mtls "):
			under.WriteString(edge)
		case strings.Contains(edge, " plaintext: hairpin "): // a pod that a service led back to itself
		case strings.Contains(edge, " plaintext"):
			t.Errorf("not under mutual TLS: %s", edge)
		}
	}
	for _, service := range carried {
		if *only == "" && !strings.Contains(under.String(), "/"+service+" ") {
			t.Errorf("no edge under mutual TLS to %s:\n%s", service, edges)
		}
	}
}

// golang runs the go command in one of the modules beside this package.
func golang(t *testing.T, module string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		text := ""
		if e, ok := err.(*exec.ExitError); ok {
			text = string(e.Stderr)
		}
		t.Fatalf("go %v in %s: %v\n%s", args, module, err, text)
	}
	return strings.TrimSpace(string(out))
}

func moduleFolder(t *testing.T, in, module string) string {
	t.Helper()
	return golang(t, in, "list", "-m", "-f", "{{.Dir}}", module)
}

// imagesOf are the images that the suite's manifests of a mesh name.
func imagesOf(t *testing.T, suite string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(suite, "mesh", "manifests.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^\s*image:\s*(\S+)$`).FindAllSubmatch(text, -1) {
		if name := string(m[1]); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		t.Fatal("the suite's manifests name no image")
	}
	return names
}

// certificate is for the echo server's own TLS; nobody verifies it.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "echo"}, DNSNames: []string{"echo"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
}

func version(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

func lastOf(s string, n int) string { return s[max(len(s)-n, 0):] }

// mesh installs Assay, and waits until it works. What it returns is its command, as kubectl's
// plugin.
func mesh(t *testing.T, c *kubernetes.Cluster) (assay func(args ...string) string) {
	t.Helper()
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for name, to := range map[string]string{"kubectl": c.KubectlPath(), "kubectl-assay": kubernetes.BuildStatic(t, "assay.dev/cmd/assay")} {
		if err := os.Symlink(to, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	assay = func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "kubectl"), append([]string{"assay"}, args...)...)
		cmd.Env = []string{"KUBECONFIG=" + c.Kubeconfig(), "PATH=" + bin, "HOME=" + bin}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl assay %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	assay("install", "--image", kubernetes.AssayImage, "--image-pull-policy", "Never", "--volume", "emptyDir", "--timeout", "7m")
	return assay
}
