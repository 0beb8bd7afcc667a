package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

func checkCommand() *cobra.Command {
	var conn connection
	var output, expiry string
	var pre bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong or will be; exit code 2 when something is",
		Long: `Check asks control what is wrong or will be. With --pre it asks a Kubernetes cluster, in
which the mesh need not be yet, what the mesh can do there and what it cannot. Exit code 2
when there is anything that is not as it should be.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFormat(output, "text", "json"); err != nil {
				return err
			}
			if pre {
				return survey(cmd, &conn.cluster, output)
			}
			within, err := parseDays(expiry)
			if err != nil {
				return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: fmt.Errorf("--expiry %s", expiry), Remedy: "want for instance 14d or 12h"}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			resp, err := call(cmd.Context(), o, "check", o.Check, &api.CheckRequest{ExpirySeconds: int64(within / time.Second)})
			if err != nil {
				return err
			}
			findings := make([]assay.Finding, len(resp.GetFindings()))
			for i, f := range resp.GetFindings() {
				if findings[i], err = f.Noun(); err != nil {
					return &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err}
				}
			}
			if output == "json" {
				items, err := encode(findings)
				if err != nil {
					return err
				}
				err = writeJSON(cmd.OutOrStdout(), items)
				if err != nil {
					return err
				}
			} else if _, err := fmt.Fprint(cmd.OutOrStdout(), findingsText(findings)); err != nil {
				return err
			}
			if len(findings) > 0 {
				return exit(exitFindings, nil)
			}
			return nil
		},
	}
	conn.flags(cmd)
	cmd.Flags().BoolVar(&pre, "pre", false, "what the mesh can do in the cluster of --kubeconfig, before it is installed")
	cmd.Flags().StringVar(&expiry, "expiry", "14d", "report authorities that end within this time")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// findingsText writes findings for people, each with its remedy.
func findingsText(findings []assay.Finding) string {
	if len(findings) == 0 {
		return "nothing is wrong\n"
	}
	var b strings.Builder
	for _, f := range findings {
		subject := oneLine(f.Subject)
		if f.Workload != "" {
			subject += " (workload " + oneLine(f.Workload) + ")"
		}
		fmt.Fprintf(&b, "%s: %s\n", oneLine(f.Kind), subject)
		for line := range strings.SplitSeq(f.Detail, "\n") {
			fmt.Fprintf(&b, "  %s\n", oneLine(line))
		}
		if f.Remedy != "" {
			fmt.Fprintf(&b, "  remedy: %s\n", oneLine(f.Remedy))
		}
	}
	noun := "findings"
	if len(findings) == 1 {
		noun = "finding"
	}
	fmt.Fprintf(&b, "%d %s\n", len(findings), noun)
	return b.String()
}

// parseDays reads a duration, in which d is 24 hours.
func parseDays(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		if _, err := fmt.Sscanf(days, "%d", &n); err != nil || fmt.Sprint(n) != days || n < 0 || n > 36500 {
			return 0, fmt.Errorf("%q is not a number of days", s)
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = fmt.Errorf("%q is negative", s)
	}
	return d, err
}
