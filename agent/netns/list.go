package netns

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// listTries bounds Whole: something changes all the time then.
const listTries = 50

// Whole asks for a list again while the kernel says that it changed as it was told
// (NLM_F_DUMP_INTR): something may be missing in it, or twice.
func Whole[T any](list func() ([]T, error)) ([]T, error) {
	for tries := 1; ; tries++ {
		got, err := list()
		if tries == listTries || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return got, err
		}
	}
}
