package capture_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"assay.dev/agent/capture"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// capturer is a capture, here or in a container.
type capturer interface {
	Install(capture.Rules, map[netip.AddrPort]bool) error
	SetOpen(map[netip.AddrPort]bool) error
	Verify() error
	Refused() (capture.Refused, error)
	Remove(returnMark uint32) error
	Close() error
}

// contained is the capture of a namespace by a process in it that may write no settings and
// enter no namespace.
type contained struct {
	in  *json.Encoder
	out *json.Decoder
}

type order struct {
	Do    string
	Rules capture.Rules
	Open  map[netip.AddrPort]bool
	Mark  uint32
}

type answer struct {
	Err     string
	Refused capture.Refused
}

func contain(t testing.TB, ns *netns.Namespace) *contained {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "ASSAY_TEST_CONTAINED=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	lab.StartContained(t, ns, cmd)
	return &contained{json.NewEncoder(in), json.NewDecoder(out)}
}

func (c *contained) ask(o order) (a answer, err error) {
	if err := errors.Join(c.in.Encode(o), c.out.Decode(&a)); err != nil {
		return a, err
	}
	if a.Err != "" {
		err = errors.New(a.Err)
	}
	return a, err
}

func (c *contained) Install(r capture.Rules, open map[netip.AddrPort]bool) error {
	_, err := c.ask(order{Do: "install", Rules: r, Open: open})
	return err
}

func (c *contained) SetOpen(open map[netip.AddrPort]bool) error {
	_, err := c.ask(order{Do: "open", Open: open})
	return err
}

func (c *contained) Verify() error {
	_, err := c.ask(order{Do: "verify"})
	return err
}

func (c *contained) Refused() (capture.Refused, error) {
	a, err := c.ask(order{Do: "refused"})
	return a.Refused, err
}

func (c *contained) Remove(mark uint32) error {
	_, err := c.ask(order{Do: "remove", Mark: mark})
	return err
}

func (c *contained) Close() error { return nil } // it ends with the test

// runContained is the process in the container.
func runContained() {
	ns, err := netns.Own()
	if err == nil {
		err = mayNot(ns)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	c := capture.New(ns)
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o order
		if in.Decode(&o) != nil {
			return
		}
		var a answer
		switch o.Do {
		case "track":
			err = capture.Track(ns, ownMark)
		case "install":
			err = c.Install(o.Rules, o.Open)
		case "open":
			err = c.SetOpen(o.Open)
		case "verify":
			err = c.Verify()
		case "refused":
			a.Refused, err = c.Refused()
		case "remove":
			err = c.Remove(o.Mark)
		}
		if err != nil {
			a.Err = err.Error()
		}
		if out.Encode(a) != nil {
			return
		}
	}
}

// mayNot fails where a container may do what one may not: the tests would prove nothing.
func mayNot(ns *netns.Namespace) error {
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fwmark_accept", []byte("1"), 0); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("write a setting: %v", err)
	}
	if err := netns.OnThread(func() error { return unix.Setns(ns.FD(), unix.CLONE_NEWNET) }); err != unix.EPERM {
		return fmt.Errorf("enter the own namespace: %v", err)
	}
	return nil
}
