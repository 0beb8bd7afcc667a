package netns

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/net/bpf"
)

// TestLostAnswer: what the kernel answers does not arrive. A question is asked again on
// another socket, and one that is never answered ends.
func TestLostAnswer(t *testing.T) {
	was := answerTime
	answerTime = 200 * time.Millisecond
	t.Cleanup(func() { answerTime = was })
	ns, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	q := QuestionsIn(ns)
	defer q.Close()
	asked := 0
	ask := func(c *nftables.Conn) error {
		asked++
		_, err := c.ListTables()
		return err
	}
	if err := q.Ask(ask); err != nil || asked != 1 {
		t.Fatalf("asked %d times: %v", asked, err)
	}
	deaf, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		t.Fatal(err)
	}
	lose := func() {
		if err := q.socket.SetBPF(deaf); err != nil {
			t.Fatal(err)
		}
	}
	lose()
	answerTime = 20 * time.Second // of the second time
	q.socket.SetDeadline(time.Now())
	err = q.Ask(func(c *nftables.Conn) error {
		if asked++; asked == 2 {
			q.socket.SetDeadline(time.Now().Add(200 * time.Millisecond))
		}
		_, err := c.ListTables()
		return err
	})
	if err != nil || asked != 3 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	answerTime, asked = 200*time.Millisecond, 0
	err = q.Ask(func(c *nftables.Conn) error { lose(); return ask(c) })
	if !errors.Is(err, os.ErrDeadlineExceeded) || asked != 2 || q.conn != nil {
		t.Errorf("asked %d times: %v", asked, err)
	}
}

// TestGeneration: every change of rules makes it another one, and nothing else does.
func TestGeneration(t *testing.T) {
	ns, err := Create()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	q := QuestionsIn(ns)
	defer q.Close()
	get := func() uint32 {
		t.Helper()
		id, err := q.Generation()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := get()
	if again := get(); again != first || first == 0 {
		t.Errorf("%d, then %d, and nothing has changed", first, again)
	}
	c, err := NFTables(ns)
	if err != nil {
		t.Fatal(err)
	}
	c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "other"})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	second := get()
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if third := get(); second == first || third == second {
		t.Errorf("%d, %d, %d", first, second, third)
	}
}
