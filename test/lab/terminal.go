package lab

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is a program at a terminal of its own, of which it has control: a person's
// place, without the person.
type Terminal struct {
	*Process
	master *os.File
	seen   int // of the output, by Expect
}

// Terminal starts a program at a new terminal of 24 rows and 80 columns.
func (s *Space) Terminal(t TB, argv ...string) *Terminal {
	t.Helper()
	master, slave, err := openPTY()
	if err != nil {
		t.Fatalf("terminal: %v", err)
	}
	defer slave.Close()
	path, err := lookProgram(argv[0])
	if strings.Contains(argv[0], "/") {
		path, err = argv[0], nil
	}
	if err != nil {
		t.Fatalf("terminal: %s: %v", argv[0], err)
	}
	p := &Process{name: argv[0], out: &tail{}, in: master, done: make(chan struct{})}
	p.cmd = &exec.Cmd{Path: path, Args: argv, Dir: "/", Env: environment()}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := s.inAll(p.cmd.Start); err != nil {
		t.Fatalf("terminal: %v", err)
	}
	p.PID = p.cmd.Process.Pid
	x := &Terminal{Process: p, master: master}
	read := make(chan struct{})
	go func() {
		defer close(read)
		x.read()
	}()
	go p.wait()
	t.Cleanup(func() {
		p.Kill() // closes master too
		<-read
		if t.Failed() {
			t.Logf("the end of what the terminal of %s showed:\n%s", strings.Join(argv, " "), lastLines(p.Output(), 40))
		}
	})
	x.Size(t, 24, 80)
	return x
}

// openPTY is posix_openpt(3) and what belongs to it.
func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("/dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err == nil {
		var n uint32
		if n, err = unix.IoctlGetUint32(fd, unix.TIOCGPTN); err == nil {
			slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
		}
	}
	if err != nil {
		master.Close()
	}
	return master, slave, err
}

// read keeps what the terminal shows until nobody has it open any more.
func (x *Terminal) read() {
	buf := make([]byte, 4096)
	for {
		n, err := x.master.Read(buf)
		x.out.Write(buf[:n])
		if err != nil {
			return
		}
	}
}

// Type types keys; "\x03" is Ctrl-C, "\x1a" is Ctrl-Z.
func (x *Terminal) Type(t TB, keys string) {
	t.Helper()
	if _, err := x.master.WriteString(keys); err != nil {
		t.Fatalf("type %q: %v", keys, err)
	}
}

// Expect waits until the terminal shows what matches, behind what was expected before,
// and returns what it showed up to there.
func (x *Terminal) Expect(t TB, pattern string) (shown string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	Eventually(t, 30*time.Second, "the terminal shows "+pattern, func() error {
		out := x.Output()
		at := re.FindStringIndex(out[x.seen:])
		if at == nil {
			return fmt.Errorf("it shows %q", out[x.seen:])
		}
		shown = out[x.seen : x.seen+at[1]]
		x.seen += at[1]
		return nil
	})
	return shown
}

// Size gives the terminal another size, as a person does who pulls at a window.
func (x *Terminal) Size(t TB, rows, columns uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(x.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatalf("size: %v", err)
	}
}

// HangUp closes the terminal.
func (x *Terminal) HangUp() { x.master.Close() }
