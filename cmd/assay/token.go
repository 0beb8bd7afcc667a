package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

// tokenCommand is about join tokens.
func tokenCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Make join tokens for hosts",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(tokenCreateCommand())
	return c
}

func tokenCreateCommand() *cobra.Command {
	var covers []string
	var ttl time.Duration
	var conn connection
	var output string
	c := &cobra.Command{
		Use:   "create --cover NAMESPACE/SERVICE …",
		Short: "Make a token with which one host can join, once",
		Long: `The host that joins with the token may run the services that match a pattern, and no
others. In a pattern '*' stands for any one name: bank/*, */*. The token also says
which control is the right one. It is a secret until it is used.`,
		Example: "  assay token create --cover bank/* --ttl 1h",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "" && output != "json" {
				return &assay.Error{Kind: assay.Invalid, Op: "create a token", Err: fmt.Errorf("output %q", output), Remedy: "want json, or nothing"}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			resp, err := call(cmd.Context(), o, "create a token", o.CreateToken, &api.CreateTokenRequest{Covers: covers, TtlSeconds: int64(ttl / time.Second)})
			if err != nil {
				return err
			}
			expires, err := api.Time(resp.GetExpires())
			if err != nil {
				return err
			}
			if output == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(struct {
					Token   string    `json:"token"`
					Covers  []string  `json:"covers"`
					Expires time.Time `json:"expires"`
				}{resp.GetToken(), covers, expires})
			}
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), resp.GetToken()); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "expires at %s\n", expires.Format(time.RFC3339))
			return err
		},
	}
	c.Flags().StringArrayVar(&covers, "cover", nil, "pattern NAMESPACE/SERVICE of what the host may run; may be given more than once")
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token can be used: a minute to seven days")
	conn.flags(c)
	c.Flags().StringVarP(&output, "output", "o", "", "json for machines")
	return c
}
