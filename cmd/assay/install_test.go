package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestInstallOptions: every option of an installation is in the documentation's table, and those of
// the chart beside it are its values, all of them.
func TestInstallOptions(t *testing.T) {
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "| option | chart's value | |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var options, values string
	for row := range strings.Lines(table) {
		cells := strings.SplitN(strings.ReplaceAll(row, `\|`, " "), "|", 4)
		options, values = options+cells[1], values+cells[2]
	}
	word := regexp.MustCompile(`[A-Za-z][A-Za-z-]*`)
	in := func(text, name string) bool {
		for _, w := range word.FindAllString(text, -1) {
			if w == name {
				return true
			}
		}
		return false
	}
	flags := regexp.MustCompile(`(?m)^ +(?:-., )?--([a-z-]+)`).FindAllStringSubmatch(installCommand().Flags().FlagUsages(), -1)
	if len(flags) < 20 {
		t.Fatalf("only %d flags", len(flags))
	}
	for _, f := range flags {
		switch f[1] {
		case "kubeconfig", "context", "dry-run", "output", "timeout": // of the command, not of what is installed
		default:
			if !in(options, f[1]) {
				t.Errorf("docs/kubernetes.md does not have --%s", f[1])
			}
		}
	}
	if text, err = os.ReadFile("../../charts/assay/values.yaml"); err != nil {
		t.Fatal(err)
	}
	var chart map[string]any
	if err := yaml.Unmarshal(text, &chart); err != nil {
		t.Fatal(err)
	}
	for name := range chart {
		if !in(values, name) {
			t.Errorf("docs/kubernetes.md does not have the chart's %s", name)
		}
	}
}
