package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"assay.dev"
)

func getCommand() *cobra.Command {
	var conn connection
	var namespace, output string
	cmd := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "List what the mesh knows",
		Long: `List what the mesh knows of a kind: ` + kindNames() + `.

NAME may be written NAMESPACE/NAME. Without a namespace all of them are listed.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkFormat(output, "table", "wide", "json", "yaml"); err != nil {
				return err
			}
			k, err := findKind(args[0])
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 2 {
				if namespace, name, err = splitName(namespace, args[1]); err != nil {
					return err
				}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			items, at, err := o.list(cmd.Context(), k.list, namespace, name)
			if err != nil {
				return err
			}
			if name != "" && len(items) == 0 {
				return notFound(k, namespace, name)
			}
			w := cmd.OutOrStdout()
			switch output {
			case "json":
				return writeJSON(w, items)
			case "yaml":
				return writeYAML(w, items)
			}
			if len(items) == 0 {
				_, err := fmt.Fprintf(cmd.ErrOrStderr(), "no %s\n", k.list)
				return err
			}
			return k.write(w, items, output == "wide", at)
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "of this namespace only")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table, wide, json or yaml")
	return cmd
}

func notFound(k kind, namespace, name string) error {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return &assay.Error{Kind: assay.NotFound, Op: "get " + k.list + " " + name, Err: errors.New("there is no such thing"), Remedy: "see assay get " + k.list}
}
