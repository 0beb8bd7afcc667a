package lifecycle

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// who starts a mesh: root, or somebody who makes a network of his own for it.
var who = []struct {
	name string
	as   []string // what a command is started with
}{
	{"root", nil},
	{"nobody", []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}},
}

// TestAskedToEnd asks `assay up` to end at every moment of its life: while it starts,
// when it has just started, and while workloads are being placed. It always ends soon,
// and so does every `assay run`; nothing is left.
func TestAskedToEnd(t *testing.T) {
	lab.Require(t, "ip", "nft", "setpriv", "nsenter")
	const patience = 5 * time.Second
	bin, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range who {
		t.Run(w.name, func(t *testing.T) {
			l := lab.New(t)
			dir := l.Dir(t, "/tmp/mesh", "")
			l.MustExec(t, "chmod", "0777", dir)
			paths := []string{"--data", dir + "/data", "--runtime", dir + "/run"}
			up := func() *lab.Process {
				return l.Start(t, append(append(append([]string{}, w.as...), bin, "up"), paths...)...)
			}
			end := func(what string, p *lab.Process) {
				t.Helper()
				// -1: a program that has not got so far as to handle signals ends by them.
				if code, willingly := p.Stop(patience); code != 0 && code != -1 || !willingly {
					t.Errorf("%s: exit code %d, by itself: %v\n%s", what, code, willingly, p.Output())
				}
			}
			for _, after := range []int{0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200} {
				p := up()
				time.Sleep(time.Duration(after) * time.Millisecond) // the moment is what is tried
				end(fmt.Sprintf("%d ms after its start", after), p)
			}
			for _, after := range []int{0, 10, 20, 40, 60, 80, 100, 150, 250, 500} {
				p := up()
				lab.Eventually(t, 30*time.Second, "assay up is ready", said(p, "assay is ready"))
				var runs []*lab.Process
				for i := range 3 {
					argv := append(append([]string{}, w.as...), bin, "run", "--socket", dir+"/run/agent.sock", "--service", fmt.Sprintf("w%d", i), "--", "sleep", "infinity")
					runs = append(runs, l.Start(t, argv...))
				}
				time.Sleep(time.Duration(after) * time.Millisecond)
				end(fmt.Sprintf("%d ms after `assay run`", after), p)
				for _, r := range runs {
					select {
					case <-r.Done():
					case <-time.After(10 * time.Second):
						t.Errorf("%d ms: an `assay run` goes on without a mesh: %s", after, r.Output())
						r.Kill()
					}
				}
			}
			err := lab.WaitFor(t.Context(), 5*time.Second, func() error {
				for _, p := range l.Processes() {
					if p.Exe == bin || p.Exe == "/usr/bin/sleep" {
						return fmt.Errorf("process %d goes on: %s", p.PID, p.Exe)
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRootlessKilled: the network of a mesh without root ends with it, however it ends.
// Nothing may go on in what nobody can enter any more.
func TestRootlessKilled(t *testing.T) {
	lab.Require(t, "ip", "nft", "setpriv", "nsenter")
	bin, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	l := lab.New(t)
	dir := l.Dir(t, "/tmp/mesh", "")
	l.MustExec(t, "chmod", "0777", dir)
	as := who[1].as
	for i := range 6 {
		up := l.Start(t, append(append([]string{}, as...), bin, "up", "--data", dir+"/data", "--runtime", dir+"/run")...)
		lab.Eventually(t, 30*time.Second, "assay up is ready", said(up, "assay is ready"))
		run := l.Start(t, append(append([]string{}, as...), bin, "run", "--socket", dir+"/run/agent.sock", "--service", "web", "--", "sleep", "infinity")...)
		lab.Eventually(t, 30*time.Second, "the command runs", func() error {
			for _, p := range l.Children(run.PID) {
				if p.Exe == "/usr/bin/sleep" {
					return nil
				}
			}
			return fmt.Errorf("%s", run.Output())
		})
		inside := l.Children(up.PID)[0].PID
		victim := up.PID
		if i%2 == 1 {
			victim = inside // the one in the namespaces
		}
		syscall.Kill(victim, syscall.SIGKILL)
		lab.Eventually(t, 30*time.Second, "everything of it has ended", func() error {
			for _, p := range l.Processes() {
				// Threads of one that is not waited for yet may still hold its files.
				if p.State == "Z" || strings.HasPrefix(p.Exe, lab.BinDir) || p.Exe == "/usr/bin/sleep" {
					return fmt.Errorf("process %d goes on: %s", p.PID, p.Command)
				}
			}
			return nil
		})
		if code := run.Code(); code != 128+int(syscall.SIGTERM) || !strings.Contains(run.Output(), "its agent has ended") {
			t.Errorf("assay run: exit code %d: %s", code, run.Output())
		}
	}
}

// said waits for a program's words.
func said(p *lab.Process, words string) func() error {
	return func() error {
		if p.Ended() {
			return fmt.Errorf("it ended with %d: %s", p.Code(), p.Output())
		}
		if !strings.Contains(p.Output(), words) {
			return fmt.Errorf("it has not said %q", words)
		}
		return nil
	}
}
