package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

// manifestFiles are the endings of files that a folder is searched for.
var manifestFiles = []string{".yaml", ".yml", ".json"}

func applyCommand() *cobra.Command {
	var conn connection
	var paths []string
	var prune, dryRun bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE|DIR",
		Short: "Declare what the files say",
		Long: `Declare what the files say: Service (v1), MeshConfig, Egress and TrafficPolicy
(assay.dev/v1alpha1),
HTTPRoute, GRPCRoute, TLSRoute and ReferenceGrant (gateway.networking.k8s.io/v1).

All files are checked together, and with what is declared already; if anything in
them is wrong, every problem is listed and nothing changes. A folder is searched for
` + strings.Join(manifestFiles, ", ") + ` with all folders beneath it; names that begin with a dot are passed over.
- is standard input.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			files, err := readManifests(paths, cmd.InOrStdin())
			if err != nil {
				return err
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			resp, err := call(cmd.Context(), o, "apply", o.Apply, &api.ApplyRequest{Files: files, Prune: prune, DryRun: dryRun})
			if err != nil {
				return err
			}
			note := ""
			if dryRun {
				note = " (dry run)"
			}
			for _, ch := range resp.GetChanges() {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s %s%s\n", objectName(ch.GetKind(), ch.GetNamespace(), ch.GetName()), ch.GetAction(), note); err != nil {
					return err
				}
			}
			return nil
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringArrayVarP(&paths, "filename", "f", nil, "file or folder; may be repeated; - is standard input")
	cmd.Flags().BoolVar(&prune, "prune", false, "remove what was applied before and is in none of the files")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would change, and change nothing")
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that is not there
	return cmd
}

func objectName(kind, namespace, name string) string {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return kind + " " + name
}

// readManifests reads files and folders; a file that is named twice is read once.
func readManifests(paths []string, stdin io.Reader) ([]*api.File, error) {
	var files []*api.File
	seen := make(map[string]bool)
	add := func(name string, text []byte, err error) error {
		if err != nil {
			return &assay.Error{Kind: assay.Invalid, Op: "read manifests", Err: err}
		}
		if !seen[name] {
			seen[name] = true
			files = append(files, &api.File{Name: name, Yaml: text})
		}
		return nil
	}
	for _, path := range paths {
		if path == "-" {
			text, err := io.ReadAll(stdin)
			if err := add("standard input", text, err); err != nil {
				return nil, err
			}
			continue
		}
		err := filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return add("", nil, err)
			case p != path && strings.HasPrefix(entry.Name(), "."):
				if entry.IsDir() {
					return fs.SkipDir
				}
				return nil
			case entry.IsDir():
				return nil
			case p != path && !slices.Contains(manifestFiles, filepath.Ext(p)):
				return nil
			}
			text, err := os.ReadFile(p)
			return add(p, text, err)
		})
		if err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read manifests", Err: errors.New("no file with one of the endings " + strings.Join(manifestFiles, ", ") + " in " + strings.Join(paths, ", "))}
	}
	return files, nil
}

func deleteCommand() *cobra.Command {
	var conn connection
	var namespace string
	cmd := &cobra.Command{
		Use:   "delete KIND NAME",
		Short: "Remove an object of intent, a token, an operator's certificate, or a host that is gone for good",
		Long: `Remove an object of intent that was applied (a service, a route …); a token; a host that is gone for
good, whose workloads are forgotten and whose certificate is refused from then on; or an
operator's certificate by its serial number, which takes it back.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := findKind(args[0])
			if err != nil {
				return err
			}
			if k.object == "" {
				return &assay.Error{Kind: assay.Invalid, Op: "delete", Err: fmt.Errorf("%s cannot be deleted: they are what is, not what was declared", k.list)}
			}
			name := args[1]
			if k.object != "host" && k.object != "token" && k.object != "certificate" {
				if namespace, name, err = splitName(namespace, name); err != nil {
					return err
				}
				if namespace == "" {
					namespace = "default"
				}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			if _, err := call(cmd.Context(), o, "delete", o.Delete, &api.DeleteRequest{Kind: k.object, Namespace: namespace, Name: name}); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s removed\n", objectName(k.object, namespace, name))
			return err
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace (default \"default\")")
	return cmd
}
