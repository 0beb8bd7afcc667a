// Package terminal puts `assay run` where a person has it: at a terminal. The command
// under it must not notice that there is somebody between: keys, job control, the
// window's size and exit codes are the kernel's own.
package terminal

import (
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// stage is a mesh, and how its user starts a workload.
type stage struct {
	*lab.Lab
	run []string
	as  []string
}

// stages runs a test as root and as somebody who has made a mesh of his own.
func stages(t *testing.T, test func(t *testing.T, s *stage)) {
	lab.Require(t, "ip", "nft", "bash", "stty", "setpriv", "nsenter")
	bin, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	for name, as := range map[string][]string{"root": nil, "nobody": {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}} {
		t.Run(name, func(t *testing.T) {
			s := &stage{Lab: lab.New(t), as: as}
			dir := s.Dir(t, "/tmp/mesh", "")
			s.MustExec(t, "chmod", "0777", dir)
			up := s.Start(t, s.user(bin, "up", "--data", dir+"/data", "--runtime", dir+"/run")...)
			lab.Eventually(t, 30*time.Second, "assay up is ready", func() error {
				if !strings.Contains(up.Output(), "assay is ready") {
					return &notYet{up.Output()}
				}
				return nil
			})
			s.run = []string{bin, "run", "--socket", dir + "/run/agent.sock", "--service", "person", "--"}
			test(t, s)
			if code, willingly := up.Stop(10 * time.Second); code != 0 || !willingly {
				t.Errorf("assay up: exit code %d, by itself: %v\n%s", code, willingly, up.Output())
			}
		})
	}
}

type notYet struct{ shown string }

func (e *notYet) Error() string { return "not yet: " + e.shown }

func (s *stage) user(argv ...string) []string { return append(append([]string{}, s.as...), argv...) }

// at starts a workload at a terminal.
func (s *stage) at(t *testing.T, argv ...string) *lab.Terminal {
	t.Helper()
	return s.Terminal(t, s.user(append(append([]string{}, s.run...), argv...)...)...)
}

// ends checks how it ended.
func ends(t *testing.T, x *lab.Terminal, code int) {
	t.Helper()
	select {
	case <-x.Done():
		if x.Code() != code {
			t.Errorf("exit code %d, want %d\n%s", x.Code(), code, x.Output())
		}
	case <-time.After(15 * time.Second):
		t.Errorf("it does not end\n%s", x.Output())
	}
}

// TestTerminal: what a command asks of its terminal, it is told.
func TestTerminal(t *testing.T) {
	stages(t, func(t *testing.T, s *stage) {
		x := s.at(t, "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && echo three of them; stty size </dev/tty; read line; echo heard $line; exit 7")
		x.Expect(t, "three of them")
		x.Expect(t, "24 80")
		x.Type(t, "a word\n")
		x.Expect(t, "heard a word")
		ends(t, x, 7)

		x = s.at(t, "bash", "-c", "trap 'stty size; kill $child; exit 0' WINCH; sleep 1000 & child=$!; echo looking; while :; do wait; done")
		x.Expect(t, "looking")
		x.Size(t, 50, 132)
		x.Expect(t, "50 132")
		ends(t, x, 0)
	})
}

// TestKeys: Ctrl-C and Ctrl-\ reach the command, once.
func TestKeys(t *testing.T) {
	stages(t, func(t *testing.T, s *stage) {
		x := s.at(t, "sleep", "1000")
		s.awaitCommand(t, x, "/usr/bin/sleep")
		x.Type(t, "\x03")
		ends(t, x, 130)

		x = s.at(t, "bash", "-c", "trap 'n=$((n+1)); echo caught' INT; echo waiting; for i in 1 2 3 4; do read -t 0.3 line; done; echo $n times; exit 3")
		x.Expect(t, "waiting")
		x.Type(t, "\x03")
		x.Expect(t, "caught")
		x.Expect(t, "1 times")
		ends(t, x, 3)

		x = s.at(t, "sh", "-c", "ulimit -c 0; echo waiting; exec sleep 1000")
		s.awaitCommand(t, x, "/usr/bin/sleep")
		x.Type(t, "\x1c")
		ends(t, x, 131)

		x = s.at(t, "cat")
		s.awaitCommand(t, x, "/usr/bin/cat")
		x.Type(t, "to the end\n\x04")
		x.Expect(t, "(?s)to the end.*to the end")
		ends(t, x, 0)
	})
}

// awaitCommand waits until the command under `assay run` is what it is to be.
func (s *stage) awaitCommand(t *testing.T, x *lab.Terminal, exe string) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, exe+" runs", func() error {
		for _, p := range s.Children(x.PID) {
			if p.Exe == exe {
				return nil
			}
		}
		return &notYet{x.Output()}
	})
}

// TestJobControl: a shell stops `assay run` with its command, goes on with both, and is
// told how they ended; a shell under `assay run` does the same with its own jobs.
func TestJobControl(t *testing.T) {
	stages(t, func(t *testing.T, s *stage) {
		const prompt = "ready> "
		shell := []string{"env", "PS1=" + prompt, "bash", "--norc", "--noprofile", "--noediting", "-i"}
		run := strings.Join(s.run, " ")

		x := s.Terminal(t, s.user(shell...)...)
		x.Expect(t, prompt)
		x.Type(t, run+" sh -c 'echo be''gun; exec sleep 1000'\n")
		x.Expect(t, "begun")
		s.awaitCommand(t, x, "/usr/bin/sleep")
		x.Type(t, "\x1a")
		x.Expect(t, "Stopped")
		x.Expect(t, prompt)
		s.awaitState(t, x, "/usr/bin/sleep", "T")
		x.Type(t, "fg\n")
		s.awaitState(t, x, "/usr/bin/sleep", "S")
		x.Type(t, "\x03")
		x.Expect(t, prompt)
		x.Type(t, "echo code $?\n")
		x.Expect(t, "code 130")

		// In the background it runs, and may not read what is typed.
		x.Type(t, run+" cat &\n")
		lab.Eventually(t, 30*time.Second, "the shell knows that it is stopped", func() error {
			x.Type(t, "jobs; echo looked $((20+3))\n")
			if shown := x.Expect(t, "looked 23"); !strings.Contains(shown, "Stopped") {
				return &notYet{shown}
			}
			return nil
		})
		x.Type(t, "fg\n")
		s.awaitState(t, x, "/usr/bin/cat", "S")
		x.Type(t, "now\n")
		x.Expect(t, "(?s)now.*now")
		x.Type(t, "\x04")
		x.Expect(t, prompt)

		x.Type(t, run+" "+strings.ReplaceAll(strings.Join(shell, " "), prompt, "inner:")+"\n")
		x.Expect(t, "inner:")
		x.Type(t, "sleep 1000\n")
		s.awaitCommand(t, x, "/usr/bin/sleep")
		x.Type(t, "\x03")
		x.Expect(t, "inner:")
		x.Type(t, "echo still $((40+2))\n")
		x.Expect(t, "still 42")
		x.Type(t, "exit 5\n")
		x.Expect(t, prompt)
		x.Type(t, "echo code $?\n")
		x.Expect(t, "code 5")
		x.Type(t, "exit 0\n")
		ends(t, x, 0)
	})
}

// awaitState waits until the process is stopped (T) or sleeps (S).
func (s *stage) awaitState(t *testing.T, x *lab.Terminal, exe, state string) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, exe+" is in state "+state, func() error {
		for _, p := range s.Children(x.PID) {
			if p.Exe == exe && p.State == state {
				return nil
			}
		}
		return &notYet{x.Output()}
	})
}

// TestHangUp: when the terminal goes, the command does.
func TestHangUp(t *testing.T) {
	stages(t, func(t *testing.T, s *stage) {
		x := s.at(t, "sleep", "1000")
		s.awaitCommand(t, x, "/usr/bin/sleep")
		x.HangUp()
		ends(t, x, 129)
		lab.Eventually(t, 30*time.Second, "nothing of it is left", func() error {
			for _, p := range s.Processes() {
				if p.Exe == "/usr/bin/sleep" || strings.HasSuffix(p.Exe, "/assay-proxy") {
					return &notYet{p.Command}
				}
			}
			return nil
		})
	})
}
