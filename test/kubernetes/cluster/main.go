// Command cluster brings up a real Kubernetes inside this machine, for trying
// things out, and takes it down again:
//
//	go run ./test/kubernetes/cluster up --nodes 1 --assay
//	go run ./test/kubernetes/cluster status
//	go run ./test/kubernetes/cluster down
//
// `up` returns when the nodes are Ready, and prints the path of a kubeconfig; with
// --assay every node has the images of this repository, to install the mesh from. The
// cluster is held by a process in the background, which `down` ends; nothing of
// it is left then. docs/test-cluster.md tells more.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"assay.dev/test/kubernetes"
)

const usage = `usage: cluster up [--name NAME] [--nodes N] [--assay]
                                                bring a cluster up; with images of this repository
       cluster down [--name NAME]               take it down
       cluster status                           what is up, and what it uses`

func main() {
	kubernetes.Init()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("say what to do\n%s", usage)
	}
	flags := flag.NewFlagSet("cluster "+args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	name := flags.String("name", "default", "")
	nodes := flags.Int("nodes", 1, "")
	images := flags.Bool("assay", false, "")
	if err := flags.Parse(args[1:]); err != nil {
		return fmt.Errorf("%w\n%s", err, usage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch args[0] {
	case "up":
		return up(ctx, *name, *nodes, *images)
	case "hold": // what `up` leaves in the background
		return hold(ctx, *name, *nodes, *images)
	case "down":
		return down(ctx, *name)
	case "status":
		return status(ctx)
	}
	return fmt.Errorf("%q is nothing that it can do\n%s", args[0], usage)
}

// up starts the process that holds the cluster and relays what it says until the
// cluster is up.
func up(ctx context.Context, name string, nodes int, images bool) error {
	cmd := exec.Command("/proc/self/exe", "hold", "--name", name, "--nodes", fmt.Sprint(nodes), fmt.Sprintf("--assay=%v", images))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	interrupted := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer interrupted()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line, last := strings.CutPrefix(lines.Text(), "error: ")
		if last {
			cmd.Wait()
			return errors.New(strings.ReplaceAll(line, "\t", "\n"))
		}
		if line == "up" {
			return nil
		}
		fmt.Println(line)
	}
	return fmt.Errorf("the process that holds the cluster ended: %v", cmd.Wait())
}

// hold brings the cluster up, holds it until a signal comes, and takes it down.
func hold(ctx context.Context, name string, nodes int, images bool) error {
	say := func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	c, err := kubernetes.New(ctx, kubernetes.Options{Name: name, Nodes: nodes, Log: say})
	if err != nil {
		say("error: %s", strings.ReplaceAll(err.Error(), "\n", "\t"))
		return err
	}
	if images {
		if err := c.LoadAssay(ctx); err != nil {
			say("error: %s", strings.ReplaceAll(err.Error(), "\n", "\t"))
			return errors.Join(err, c.Close())
		}
	}
	say("Kubernetes %s is up after %.1f s (%s).", c.Version(), c.Figures.Took.Seconds(), c.Figures)
	say("")
	say("%s", exports(c.Kubeconfig(), c.KubectlPath()))
	if images {
		say("On every node: %s, %s", kubernetes.AssayImage, kubernetes.EchoImage)
		say("")
	}
	down := "go run ./test/kubernetes/cluster down"
	if name != "default" {
		down += " --name " + name
	}
	say("Take it down with: %s", down)
	say("up")
	os.Stdout.Close() // nobody reads on
	<-ctx.Done()
	return c.Close()
}

// exports is what a person's shell needs. kubectl's own plugins look for it in the PATH,
// where nothing else of a cluster's programs belongs.
func exports(kubeconfig, kubectl string) string {
	bin := filepath.Join(filepath.Dir(kubeconfig), "bin")
	err := os.Mkdir(bin, 0o755)
	if err == nil {
		err = os.Symlink(kubectl, filepath.Join(bin, "kubectl"))
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		bin = filepath.Dir(kubectl)
	}
	return fmt.Sprintf("  export KUBECONFIG=%s\n  export PATH=%s:$PATH\n", kubeconfig, bin)
}

func down(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	wasUp, err := kubernetes.Down(ctx, name)
	if err != nil {
		return err
	}
	if !wasUp {
		fmt.Printf("no cluster %s was up\n", name)
	}
	return nil
}

func status(ctx context.Context) error {
	running, err := kubernetes.Running(ctx)
	if err != nil {
		return err
	}
	if len(running) == 0 {
		fmt.Println("no cluster is up")
	}
	for _, r := range running {
		fmt.Printf("%s: Kubernetes %s, %d nodes, up for %s, %s\n\n%s\n",
			r.Name, r.Version, r.Nodes, time.Since(r.Began).Round(time.Second), r.Server, exports(r.Kubeconfig, r.Kubectl))
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		nodes := exec.CommandContext(ctx, r.Kubectl, "--kubeconfig", r.Kubeconfig, "get", "nodes", "-o", "wide")
		nodes.Stdout, nodes.Stderr = os.Stdout, os.Stderr
		nodesErr := nodes.Run()
		cancel()
		uses, err := kubernetes.Uses(r.Name)
		if err := errors.Join(nodesErr, err); err != nil {
			return err
		}
		fmt.Printf("\n%s", kubernetes.Table(uses))
	}
	return nil
}
