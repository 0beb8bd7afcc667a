package http1

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"
)

// The engine reads and writes sockets without telling Go's scheduler (package nowait), and
// the proxy changes its processors as it runs (package cores). None of that may keep the
// world from stopping, or a request from getting on.

// within fails when f takes longer than anything but standing still can take.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("it stands still\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// TestWorldStopsUnderLoad stops the world over and over while requests are carried.
func TestWorldStopsUnderLoad(t *testing.T) {
	w := newWorld(t, meshed, answers(t), quiet)
	processors := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(processors)
	over, stops := make(chan struct{}), 0
	var stopper sync.WaitGroup
	stopper.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
			}
			runtime.GOMAXPROCS(1 + stops%2)
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			if stops++; stops%16 == 0 {
				runtime.GC()
			}
		}
	})
	within(t, func() {
		load(t, w, 1, 300)
		load(t, w, 8, 3000)
		close(over)
		stopper.Wait()
	})
	if stops == 0 {
		t.Error("the world was never stopped")
	}
	t.Logf("stopped %d times", stops)
}

// TestProcessors carries requests on one processor, on two, and on more than there are.
func TestProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for _, n := range []int{1, 2, 8} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			runtime.GOMAXPROCS(n)
			w := newWorld(t, meshed, answers(t), quiet)
			within(t, func() {
				load(t, w, 1, 200)
				load(t, w, 32, 2000)
			})
		})
	}
}

const quotaEnv = "ASSAY_TEST_QUOTA"

// TestQuota carries requests in a process that the kernel gives a fifth of a processor, and
// so takes it from again and again at any instruction.
func TestQuota(t *testing.T) {
	if os.Getenv(quotaEnv) != "" {
		io.Copy(io.Discard, os.Stdin) // until the quota holds
		w := newWorld(t, meshed, answers(t), quiet)
		within(t, func() {
			load(t, w, 1, 100)
			load(t, w, 16, 1000)
		})
		return
	}
	if testing.Short() {
		t.Skip("takes seconds")
	}
	group := quota(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestQuota$", "-test.timeout=3m")
	cmd.Env = append(os.Environ(), quotaEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out safeBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	err = os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0)
	in.Close()
	if waitErr := cmd.Wait(); err != nil || waitErr != nil {
		t.Errorf("%v, %v\n%s", err, waitErr, out.b)
	}
	text, _ := os.ReadFile(filepath.Join(group, "cpu.stat"))
	t.Logf("%s", text)
}

type safeBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = append(s.b, p...)
	return len(p), nil
}

// quota makes a control group that has a fifth of a processor, of whichever version there is.
func quota(t *testing.T) string {
	name := fmt.Sprintf("assay-test-%d", os.Getpid())
	for _, v := range []struct{ root, file, value string }{
		{"/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "20000"},
		{"/sys/fs/cgroup", "cpu.max", "20000 100000"},
	} {
		group := filepath.Join(v.root, name)
		if os.Mkdir(group, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(group) })
		if os.WriteFile(filepath.Join(group, v.file), []byte(v.value), 0) == nil {
			return group
		}
		os.Remove(group)
	}
	t.Skip("no control group can be made here")
	return ""
}
