package netns_test

import (
	"errors"
	"testing"

	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
)

// TestWhole: a list that changed while it was told is asked for again, any other error
// is passed on.
func TestWhole(t *testing.T) {
	asked := 0
	got, err := netns.Whole(func() ([]int, error) {
		if asked++; asked < 3 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if len(got) != 2 || err != nil || asked != 3 {
		t.Errorf("%v %v after %d", got, err, asked)
	}
	broken := errors.New("broken")
	if _, err := netns.Whole(func() ([]int, error) { return nil, broken }); err != broken {
		t.Error(err)
	}
	if _, err := netns.Whole(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("one that always changes: %v", err)
	}
}
