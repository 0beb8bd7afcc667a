package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"assay.dev"
	installation "assay.dev/kube/install"
)

// inCluster is where control is for who has a cluster: "kubernetes", or
// "kubernetes:NAMESPACE".
const inCluster = "kubernetes"

// isPlugin reports whether kubectl executes this command: kubectl knows a plugin by the name
// of its file.
func isPlugin() bool {
	return strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe") == "kubectl-assay"
}

// defaultControl is where commands look for control.
func defaultControl() string {
	if isPlugin() {
		return inCluster
	}
	return defaultSocket()
}

// podAddress returns the namespace of control's pod, if that is where control is.
func podAddress(control string) (namespace string, ok bool) {
	if control == inCluster {
		return installation.DefaultNamespace, true
	}
	return strings.CutPrefix(control, inCluster+":")
}

// kubectlConn is a connection through `kubectl exec` to the operators' socket in control's
// pod. Whoever may execute commands in that pod is an operator.
type kubectlConn struct {
	net.Conn
	process *os.Process
	ended   chan struct{}
	stderr  tail
}

// dialPod connects. kubectl lives as long as the connection.
func dialPod(cluster *clusterFlags, namespace string) (net.Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "kubectl"), os.NewFile(uintptr(pair[1]), "kubectl")
	unix.CloseOnExec(pair[0])
	unix.CloseOnExec(pair[1])
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, err
	}
	args := []string{"exec", "-i", "--namespace", namespace}
	if cluster.kubeconfig != "" {
		args = append(args, "--kubeconfig", cluster.kubeconfig)
	}
	if cluster.context != "" {
		args = append(args, "--context", cluster.context)
	}
	args = append(args, "deployment/"+installation.ControlName, "--", "/usr/local/bin/assay", "relay")
	c := &kubectlConn{Conn: conn, ended: make(chan struct{})}
	cmd := exec.Command("kubectl", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, &c.stderr
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	c.process = cmd.Process
	go c.wait(cmd)
	return c, nil
}

func (c *kubectlConn) wait(cmd *exec.Cmd) {
	cmd.Wait() // what it said says more than how it ended
	close(c.ended)
}

// kubectlPatience is how long kubectl may take to end.
const kubectlPatience = 3 * time.Second

// Read tells, at the end, what kubectl had to say about it.
func (c *kubectlConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 || err == nil {
		return n, err
	}
	select {
	case <-c.ended:
		if text := c.stderr.last(); text != "" {
			err = errors.New("kubectl exec: " + text)
		}
	case <-time.After(kubectlPatience):
	}
	return n, err
}

// Close ends kubectl, which ends when nobody speaks to it any more, or is made to.
func (c *kubectlConn) Close() error {
	err := c.Conn.Close()
	select {
	case <-c.ended:
	case <-time.After(kubectlPatience):
		c.process.Kill()
		<-c.ended
	}
	return err
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-4096):]
	return len(p), nil
}

// last is the last line, but for what kubectl says of every command that failed.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := bytes.Split(bytes.TrimSpace(t.text), []byte("\n"))
	if n := len(lines); n > 1 && bytes.HasPrefix(lines[n-1], []byte("command terminated with exit code")) {
		lines = lines[:n-1]
	}
	return strings.TrimPrefix(oneLine(string(lines[len(lines)-1])), "assay: ")
}

// relayCommand is the other end of kubectlConn.
func relayCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use:    "relay",
		Short:  "Relay standard input and output to the operators' socket",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return relay(cmd.Context(), socket, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket(), "control's socket")
	return c
}

// relay ends when control has nothing more to say, or nobody listens.
func relay(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	if err := probeSocket(ctx, socket); err != nil {
		return err
	}
	conn, err := (&net.Dialer{Timeout: dialPatience}).DialContext(ctx, "unix", socket)
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "reach control at " + socket, Err: err}
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	go relayIn(conn.(*net.UnixConn), in)
	if _, err := io.Copy(out, conn); err != nil && ctx.Err() == nil {
		return fmt.Errorf("relay from %s: %w", socket, err)
	}
	return nil
}

// relayIn ends with the process: a read of standard input cannot be ended otherwise.
func relayIn(conn *net.UnixConn, in io.Reader) {
	io.Copy(conn, in)
	conn.CloseWrite()
}
