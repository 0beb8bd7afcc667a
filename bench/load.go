package main

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// load is one run of the client.
type load struct {
	path        string
	connections int
	duration    time.Duration
	fresh       bool // a new connection for every request
}

// sample is one measurement.
type sample struct {
	CPU      float64 // microseconds of both proxies for each request
	PerMB    float64 // milliseconds of both proxies for each 2^20 bytes of bodies
	Requests float64 // per second
	Bytes    float64 // per second
	P50, P99 float64 // microseconds
	P999     float64
	Memory   memory // during the load
	Sockets  int    // between the proxies, during the load
	Errors   int
}

// measure runs the client for a while and reads the proxies' accounts before,
// during and after it.
func (c *contender) measure(r *run, w load) sample {
	argv := []string{"wrk", "-t1", "-c" + strconv.Itoa(w.connections), "-d" + wrkTime(w.duration), "--latency", "--timeout", "10s", "-s", percentileFile}
	if w.fresh {
		argv = append(argv, "-H", "Connection: close")
	}
	argv = append(argv, c.url(portHTTP1)+w.path)
	out, used, s := c.watch(r, w.duration, argv...)
	requests, bytes, took := s.parse(r, out)
	s.account(r, c, fmt.Sprintf("c=%-3d %s fresh=%v", w.connections, w.path, w.fresh), used, requests, bytes, took)
	return s
}

// watch runs a client that takes d, and returns what it said and what both proxies used
// meanwhile.
func (c *contender) watch(r *run, d time.Duration, argv ...string) (out string, used time.Duration, s sample) {
	pids := c.proxies()
	before := cpuOf(pids)
	p := c.client.Start(r, argv...)
	select {
	case <-time.After(d * 7 / 10):
		s.Memory, s.Sockets = readMemory(pids), c.sockets(r)
	case <-p.Done():
	case <-r.ctx.Done():
		r.Fatalf("interrupted")
	}
	if code := p.Code(); code != 0 {
		r.Fatalf("%s: %s: exit code %d\n%s", c.name, argv[0], code, p.Output())
	}
	return p.Output(), cpuOf(c.proxies()) - before, s
}

// account divides what was used by what was done.
func (s *sample) account(r *run, c *contender, what string, used time.Duration, requests, bytes, took float64) {
	if requests == 0 {
		r.Fatalf("%s: no request was answered: %s", c.name, what)
	}
	s.CPU = used.Seconds() * 1e6 / requests
	s.Requests = requests / took
	s.Bytes = bytes / took
	if bytes > 0 {
		s.PerMB = used.Seconds() * 1e3 / (bytes / (1 << 20))
	}
	r.Logf("%-8s %s: %.1f us, %.0f/s, %.3f ms/MB, p50 %.0f, p99 %.0f, p99.9 %.0f, %d sockets, %d errors, %.1f MB", c.name, what, s.CPU, s.Requests, s.PerMB, s.P50, s.P99, s.P999, s.Sockets, s.Errors, mb(s.Memory.RSS))
}

// percentileScript has wrk tell what it does not by itself.
const (
	percentileFile   = "/tmp/percentile.lua"
	percentileScript = "done = function(_, latency) io.write(string.format('p99.9 %d us\\n', latency:percentile(99.9))) end\n"
)

// wrkTime is what wrk understands: whole seconds.
func wrkTime(d time.Duration) string {
	return strconv.Itoa(max(1, int(d.Round(time.Second)/time.Second))) + "s"
}

var (
	wrkTotal  = regexp.MustCompile(`(\d+) requests in ([\d.]+)(\w+), ([\d.]+)(\w+) read`)
	wrkP50    = regexp.MustCompile(`50%\s+([\d.]+)(\w+)`)
	wrkP99    = regexp.MustCompile(`99%\s+([\d.]+)(\w+)`)
	wrkP999   = regexp.MustCompile(`p99\.9 ([\d.]+) us`)
	wrkErrors = regexp.MustCompile(`Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)`)
	wrkNot2xx = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
)

func (s *sample) parse(r *run, out string) (requests, bytes, seconds float64) {
	m := wrkTotal.FindStringSubmatch(out)
	if m == nil {
		r.Fatalf("wrk: output not understood:\n%s", out)
	}
	requests = number(m[1])
	seconds = micros(m[2], m[3]) / 1e6
	bytes = number(m[4]) * map[string]float64{"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}[m[5]]
	if m := wrkP50.FindStringSubmatch(out); m != nil {
		s.P50 = micros(m[1], m[2])
	}
	if m := wrkP99.FindStringSubmatch(out); m != nil {
		s.P99 = micros(m[1], m[2])
	}
	if m := wrkP999.FindStringSubmatch(out); m != nil {
		s.P999 = number(m[1])
	}
	if m := wrkErrors.FindStringSubmatch(out); m != nil {
		for _, n := range m[1:] {
			s.Errors += int(number(n))
		}
	}
	if m := wrkNot2xx.FindStringSubmatch(out); m != nil {
		s.Errors += int(number(m[1]))
	}
	return requests, bytes, seconds
}

func number(s string) float64 {
	v, _ := strconv.ParseFloat(s, 64)
	return v
}

func micros(value, unit string) float64 {
	return number(value) * map[string]float64{"us": 1, "ms": 1e3, "s": 1e6, "m": 60e6}[unit]
}

// cpuOf returns user plus system time of processes, threads that ended included.
func cpuOf(pids []int) time.Duration {
	var ticks float64
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 12 {
			ticks += number(f[11]) + number(f[12]) // proc(5): utime, stime
		}
	}
	return time.Duration(ticks * float64(time.Second) / 100) // USER_HZ is 100 on every Linux architecture of today
}

// memory is in bytes, the sum of several processes.
type memory struct {
	RSS       int64 `json:"rss"`
	PSS       int64 `json:"pss"`
	Anonymous int64 `json:"anonymous"`
}

func readMemory(pids []int) memory {
	var m memory
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) != 3 || f[2] != "kB" {
				continue
			}
			v := int64(number(f[1])) << 10
			switch f[0] {
			case "Rss:":
				m.RSS += v
			case "Pss:":
				m.PSS += v
			case "Anonymous:":
				m.Anonymous += v
			}
		}
	}
	return m
}
