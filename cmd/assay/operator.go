package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"assay.dev"
	"assay.dev/api"
)

// operatorCommands are what people and machines ask control for. They work on every
// system.
func operatorCommands() []*cobra.Command {
	return []*cobra.Command{
		applyCommand(), deleteCommand(), getCommand(), describeCommand(),
		statCommand(), edgesCommand(), checkCommand(), tokenCommand(), operatorCommand(), rotateCommand(), tapCommand(),
		installCommand(), uninstallCommand(), relayCommand(),
	}
}

const (
	callPatience = 15 * time.Second // for one call to control
	dialPatience = 5 * time.Second
	largestList  = 512 << 20 // bytes of one answer: every workload of a large mesh
)

// connection is how a command reaches control.
type connection struct {
	control       string
	cert, key, ca string
	cluster       clusterFlags
}

func (c *connection) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.control, "control", defaultControl(), "control's socket, its address HOST:PORT, or kubernetes[:NAMESPACE] for the one in a cluster, by kubectl exec")
	c.cluster.flags(cmd)
	f.StringVar(&c.cert, "cert", "", "with an address: operator certificate, a PEM file with its chain")
	f.StringVar(&c.key, "key", "", "with an address: its key, a PEM file")
	f.StringVar(&c.ca, "ca", "", "with an address: the mesh's roots, a PEM file")
}

// operator is a connection to control.
type operator struct {
	api.OperatorClient
	conn *grpc.ClientConn
	name string // where control is
}

// open connects to control. The caller closes the operator.
func (c *connection) open(ctx context.Context) (*operator, error) {
	var network string
	var creds credentials.TransportCredentials
	address, isUnix := strings.CutPrefix(c.control, "unix:")
	namespace, inPod := podAddress(c.control)
	switch {
	case inPod && (c.cert != "" || c.key != "" || c.ca != ""):
		return nil, &assay.Error{Kind: assay.Invalid, Op: "reach control in the cluster", Err: errors.New("certificates are for addresses; in its pod control knows the caller's uid"),
			Remedy: "leave out --cert, --key and --ca, or give --control HOST:PORT"}
	case inPod:
		if _, err := exec.LookPath("kubectl"); err != nil {
			return nil, &assay.Error{Kind: assay.NotFound, Op: "reach control in the cluster", Err: err, Remedy: "install kubectl, or give --control HOST:PORT"}
		}
		creds = insecure.NewCredentials()
	case isUnix || strings.Contains(address, "/"):
		if c.cert != "" || c.key != "" || c.ca != "" {
			return nil, &assay.Error{Kind: assay.Invalid, Op: "reach control at " + address, Err: errors.New("certificates are for addresses; on its socket control knows the caller's uid"),
				Remedy: "leave out --cert, --key and --ca, or give --control HOST:PORT"}
		}
		network, creds = "unix", insecure.NewCredentials()
		if err := probeSocket(ctx, address); err != nil {
			return nil, err
		}
	default:
		config, err := c.tls()
		if err != nil {
			return nil, err
		}
		if err := probeTLS(ctx, address, config); err != nil {
			return nil, err
		}
		network, creds = "tcp", credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestList)),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) {
			if inPod {
				return dialPod(&c.cluster, namespace)
			}
			return (&net.Dialer{Timeout: dialPatience}).DialContext(ctx, network, to)
		}))
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "reach control at " + c.control, Err: err, Remedy: "give a socket's path or HOST:PORT"}
	}
	return &operator{api.NewOperatorClient(conn), conn, address}, nil
}

func (o *operator) close() { _ = o.conn.Close() } // nothing of it is left to be told

// probeSocket says what is wrong with a socket in words of its own; gRPC's would
// be about a transport.
func probeSocket(ctx context.Context, path string) error {
	conn, err := (&net.Dialer{Timeout: dialPatience}).DialContext(ctx, "unix", path)
	if err == nil {
		return conn.Close()
	}
	e := &assay.Error{Kind: assay.Unavailable, Op: "reach control at " + path, Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Err, e.Remedy = errors.New("there is no such socket"), "start control: assay up; or say where it is with --control"
	case errors.Is(err, unix.ECONNREFUSED):
		e.Err, e.Remedy = errors.New("nobody listens on the socket: control has ended"), "start it again: assay up"
	case errors.Is(err, fs.ErrPermission):
		e.Kind, e.Err, e.Remedy = assay.Denied, errors.New("this user may not open the socket"), "become the user that started control, or use an operator certificate"
	}
	return e
}

// probeTLS says what is wrong with a certificate, ours or control's. In TLS 1.3 a server
// refuses a client's only after the client has done its part, so its first word is
// waited for. Whoever cannot be reached is gRPC's to tell.
func probeTLS(ctx context.Context, address string, config *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil
	}
	defer raw.Close()
	conn := tls.Client(raw, config)
	deadline, _ := ctx.Deadline()
	raw.SetDeadline(deadline)
	if err = conn.HandshakeContext(ctx); err == nil {
		_, err = conn.Read(make([]byte, 1)) // HTTP/2 begins with the server's settings
	}
	e := &assay.Error{Kind: assay.Denied, Op: "reach control at " + address, Err: err}
	var alert tls.AlertError
	switch {
	case errors.As(err, &alert) || err != nil && strings.Contains(err.Error(), "remote error: tls:"):
		e.Err = fmt.Errorf("control does not take the certificate (%w)", err)
		e.Remedy = "it has ended by control's clock, was taken back, or is of another mesh: make another one where control runs: assay operator create NAME"
	case isUnknownAuthority(err):
		e.Remedy = "the mesh's root was replaced since --ca was written, or this is another mesh: make key, certificate and roots again where control runs: assay operator create NAME"
	default:
		return nil
	}
	return e
}

func isUnknownAuthority(err error) bool {
	_, ok := errors.AsType[x509.UnknownAuthorityError](err)
	return ok
}

// tls reads the operator's certificate; whose mesh it is says its own name.
func (c *connection) tls() (*tls.Config, error) {
	op := "reach control at " + c.control
	if c.cert == "" || c.key == "" || c.ca == "" {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("an address needs --cert, --key and --ca"),
			Remedy: "make them where control runs: assay operator create NAME"}
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err, Remedy: "--cert and --key must be PEM files that belong together"}
	}
	pem, err := os.ReadFile(c.ca)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New(c.ca + " has no certificate in PEM")}
	}
	if end := pair.Leaf.NotAfter; time.Now().After(end) {
		return nil, &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("%s ended at %s", c.cert, end.Format(time.RFC3339)), Remedy: "make another one where control runs: assay operator create NAME"}
	}
	domain := ""
	if len(pair.Leaf.URIs) == 1 {
		domain, _, _, err = assay.ParseInfrastructure(pair.Leaf.URIs[0])
	}
	if err != nil || domain == "" {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New(c.cert + " is not an operator certificate"), Remedy: "make one where control runs: assay operator create NAME"}
	}
	return api.ClientTLS(api.Credentials{
		TrustDomain: domain,
		Roots:       func() *x509.CertPool { return roots },
		Certificate: func() (*tls.Certificate, error) { return &pair, nil },
	}), nil
}

// call runs one call with a deadline and turns its error into one for people.
func call[Q, R any](ctx context.Context, o *operator, op string, method func(context.Context, *Q, ...grpc.CallOption) (*R, error), request *Q) (*R, error) {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	resp, err := method(ctx, request)
	if err != nil {
		return nil, explain(op, o.name, err)
	}
	return resp, nil
}

func explain(op, where string, err error) error {
	err = api.StatusError(op, err)
	if e, ok := errors.AsType[*assay.Error](err); ok && e.Kind == assay.Unavailable && e.Remedy == "" {
		e.Op, e.Remedy = op+" at "+where, "see that control runs there and can be reached"
	}
	return err
}

// list asks for the documents of a kind. at is control's time.
func (o *operator) list(ctx context.Context, kind, namespace, name string) (items [][]byte, at time.Time, err error) {
	resp, err := call(ctx, o, "list "+kind, o.List, &api.ListRequest{Kind: kind, Namespace: namespace, Name: name})
	if err != nil {
		return nil, at, err
	}
	at, err = api.Time(resp.GetTime())
	return resp.GetItems(), at, err
}

// listAs is list for documents of one type.
func listAs[T any](ctx context.Context, o *operator, kind, namespace, name string) ([]T, time.Time, error) {
	items, at, err := o.list(ctx, kind, namespace, name)
	if err != nil {
		return nil, at, err
	}
	docs, err := decode[T](items)
	return docs, at, err
}

func decode[T any](items [][]byte) ([]T, error) {
	docs := make([]T, len(items))
	for i, raw := range items {
		if err := json.Unmarshal(raw, &docs[i]); err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: "read control's answer", Err: err, Remedy: "control and this command are of releases that do not match"}
		}
	}
	return docs, nil
}

// splitName reads NAME or NAMESPACE/NAME.
func splitName(namespace, name string) (string, string, error) {
	ns, rest, both := strings.Cut(name, "/")
	if !both {
		return namespace, name, nil
	}
	if namespace != "" && namespace != ns {
		return "", "", &assay.Error{Kind: assay.Invalid, Op: "read arguments", Err: fmt.Errorf("%s is not in namespace %s", name, namespace), Remedy: "give the namespace once"}
	}
	return ns, rest, nil
}
