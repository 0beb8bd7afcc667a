package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

// operatorCommand is about people and machines that call control from elsewhere.
func operatorCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "operator",
		Short: "Make certificates for people and machines that call control",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(operatorCreateCommand())
	return c
}

// operatorFiles are the endings of key, certificate and roots, in this order.
var operatorFiles = [3]string{".key", ".crt", "-ca.crt"}

func operatorCreateCommand() *cobra.Command {
	var conn connection
	var role, dir, ttl string
	c := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a key and a certificate for an operator",
		Long: `Make a key here and have control sign a certificate for it. Written are NAME.key
(mode 0600), NAME.crt and NAME-ca.crt, for --key, --cert and --ca of other commands.
A viewer may look; an operator may change. Who is what cannot be changed later: make
another one and let this one end.`,
		Example: "  assay operator create alice --role viewer --ttl 30d",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			op := "create operator " + name
			life, err := parseDays(ttl)
			if err != nil {
				return &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("--ttl %s", ttl), Remedy: "want for instance 30d or 12h"}
			}
			if !assay.ValidName(name) {
				return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("a name may hold a-z, 0-9 and '-', 63 characters at most")}
			}
			base := filepath.Join(dir, name)
			for _, ending := range operatorFiles {
				if _, err := os.Lstat(base + ending); !errors.Is(err, fs.ErrNotExist) {
					return &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("%s is there already", base+ending), Remedy: "choose another folder with --dir, or move it away"}
				}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return err
			}
			csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
			if err != nil {
				return err
			}
			private, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				return err
			}
			resp, err := call(cmd.Context(), o, op, o.IssueOperator, &api.IssueOperatorRequest{Name: name, Role: role, Csr: csr, TtlSeconds: int64(life / time.Second)})
			if err != nil {
				return err
			}
			roots, err := resp.GetBundle().Certificates()
			if err != nil {
				return err
			}
			var ca [][]byte
			for _, r := range roots {
				ca = append(ca, r.Raw)
			}
			for i, der := range [][][]byte{{private}, resp.GetChain(), ca} {
				block, mode := "CERTIFICATE", fs.FileMode(0o644)
				if i == 0 {
					block, mode = "PRIVATE KEY", 0o600
				}
				path := base + operatorFiles[i]
				if err := writePEM(path, block, der, mode); err != nil {
					return &assay.Error{Kind: assay.Internal, Op: op, Err: err, Remedy: "see that the folder is there and can be written"}
				}
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), path); err != nil {
					return err
				}
			}
			return nil
		},
	}
	conn.flags(c)
	c.Flags().StringVar(&role, "role", "viewer", "viewer or operator")
	c.Flags().StringVar(&ttl, "ttl", "30d", "how long the certificate lives")
	c.Flags().StringVar(&dir, "dir", ".", "folder for the three files")
	return c
}

// writePEM writes a new file; it never overwrites a key.
func writePEM(path, block string, der [][]byte, mode fs.FileMode) error {
	var text bytes.Buffer
	for _, b := range der {
		if err := pem.Encode(&text, &pem.Block{Type: block, Bytes: b}); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(text.Bytes())
	return errors.Join(err, f.Close())
}

func rotateCommand() *cobra.Command {
	var conn connection
	var deadline string
	c := &cobra.Command{
		Use:   "rotate",
		Short: "Begin to replace the mesh's root certificate",
		Long: `Begin to replace the mesh's root certificate. The new root is published at once and
signs only when every live proxy and host trusts it, or at the deadline; nothing is
restarted. Watch it with: assay get bundle`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			within := time.Duration(0)
			if deadline != "" {
				var err error
				if within, err = parseDays(deadline); err != nil || within < time.Second {
					return &assay.Error{Kind: assay.Invalid, Op: "rotate", Err: fmt.Errorf("--deadline %s", deadline), Remedy: "want for instance 1d or 12h"}
				}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			resp, err := call(cmd.Context(), o, "rotate", o.Rotate, &api.RotateRequest{DeadlineSeconds: int64(within / time.Second)})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "the new root is published in bundle %d\n", resp.GetBundleVersion())
			return err
		},
	}
	conn.flags(c)
	c.Flags().StringVar(&deadline, "deadline", "", "when the new root signs at the latest, for instance 1d; without it all are waited for")
	return c
}
