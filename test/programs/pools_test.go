package programs

import (
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestPools(t *testing.T) {
	run(t, []scenario{
		{"silent pool", nil, testSilentPool},
		{"checker", nil, testChecker},
		{"dribble", nil, testDribble},
	})
}

// testSilentPool: a pool opens its connections and says nothing; the server sees
// them all the same, and each still works when it is needed.
func testSilentPool(t *testing.T, w *lab.World) {
	server := w.Workload(t, "pooled", lab.Spec{Ports: []int{7000}})
	client := w.Workload(t, "pool", lab.Spec{})
	var accepted atomic.Int32
	server.Serve(t, 7000, func(c *net.TCPConn) {
		accepted.Add(1)
		io.Copy(c, c)
	})
	to := w.AwaitService(t, client, "pooled", 7000)
	before := accepted.Load()
	const size = 20
	var pool []*net.TCPConn
	for range size {
		pool = append(pool, client.MustDial(t, to))
	}
	lab.Eventually(t, 30*time.Second, "the server has every connection of the silent pool", func() error {
		if n := accepted.Load() - before; n < size {
			return fmt.Errorf("%d of %d", n, size)
		}
		return nil
	})
	for i, c := range slices.Backward(pool) {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		message := fmt.Sprintf("GETish request %d\n", i)
		if _, err := c.Write([]byte(message)); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		got := make([]byte, len(message))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != message {
			t.Fatalf("connection %d: %q, %v", i, got, err)
		}
	}
}

// testChecker: a health check that connects and closes sees a live port as live
// and a dead one as refused.
func testChecker(t *testing.T, w *lab.World) {
	server := w.Workload(t, "checked", lab.Spec{Ports: []int{7100}})
	client := w.Workload(t, "checker", lab.Spec{})
	var to = func() (addr func() error) {
		l := server.Listen(t, 7100)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(io.Discard, c)
				c.Close()
			}
		}()
		target := w.AwaitService(t, client, "checked", 7100)
		for i := range 50 {
			c, err := client.Dial(target)
			if err != nil {
				t.Fatalf("check %d of a live port: %v", i, err)
			}
			c.Close()
		}
		l.Close()
		<-done
		return func() error {
			c, err := client.Dial(target)
			if err == nil {
				c.Close()
				return fmt.Errorf("a dead port was connected")
			}
			return nil
		}
	}()
	lab.Eventually(t, 30*time.Second, "a dead port is seen as dead", to)
}

// testDribble: a client that sends its request a byte at a time gets its answer.
func testDribble(t *testing.T, w *lab.World) {
	server := w.Workload(t, "patient", lab.Spec{Ports: []int{7200}})
	client := w.Workload(t, "dribbler", lab.Spec{})
	const request = "GET / HTTP/1.1\r\nHost: patient\r\nConnection: close\r\n\r\n"
	server.Serve(t, 7200, func(c *net.TCPConn) {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		got := make([]byte, 0, 4096)
		for len(got) < 4 || string(got[len(got)-4:]) != "\r\n\r\n" {
			b := make([]byte, 1)
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			got = append(got, b...)
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	})
	to := w.AwaitService(t, client, "patient", 7200)
	c := client.MustDial(t, to)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.SetNoDelay(true)
	pause := time.NewTicker(4 * time.Millisecond)
	defer pause.Stop()
	for i := range len(request) {
		if _, err := c.Write([]byte(request[i : i+1])); err != nil {
			t.Fatalf("byte %d: %v", i, err)
		}
		<-pause.C
	}
	answer, err := io.ReadAll(c)
	if err != nil || len(answer) == 0 || string(answer[len(answer)-2:]) != "ok" {
		t.Errorf("answer %q, %v", answer, err)
	}
}
