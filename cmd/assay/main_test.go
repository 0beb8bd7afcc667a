package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestExitCodes(t *testing.T) {
	cases := []struct {
		args   []string
		code   int
		stdout string
		stderr string
	}{
		{[]string{"version"}, 0, "assay ", ""},
		{nil, 0, "assay demo", ""},
		{[]string{"nonsense"}, 1, "", `assay: unknown command "nonsense"`},
		{[]string{"version", "--nonsense"}, 1, "", "assay: unknown flag: --nonsense"},
		{[]string{"version", "extra"}, 1, "", "assay: unknown command"},
	}
	for _, c := range cases {
		var out, errs bytes.Buffer
		code := run(t.Context(), c.args, strings.NewReader(""), &out, &errs)
		if code != c.code || !strings.Contains(out.String(), c.stdout) || !strings.Contains(errs.String(), c.stderr) {
			t.Errorf("assay %v: exit code %d\n%s%s", c.args, code, out.Bytes(), errs.Bytes())
		}
	}
}

func TestExitError(t *testing.T) {
	cause := errors.New("two findings")
	if err := exit(exitFindings, cause); !errors.Is(err, cause) || err.Error() != "two findings" {
		t.Errorf("%v", err)
	}
	if err := exit(7, nil); err.Error() != "exit code 7" {
		t.Errorf("%v", err)
	}
}

// TestCommandsAreDescribed wants a line for people on each command and flag.
func TestCommandsAreDescribed(t *testing.T) {
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Short == "" && !c.Hidden {
			t.Errorf("%s has no Short", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(rootCommand())
}
