package main

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
)

const h2loadOutput = `starting benchmark...
spawning thread #0: 8 total client(s). Timing-based test with 0s of warm-up time and 1s of main duration for measurements.
Warm-up started for thread #0.
Application protocol: h2c
finished in 1.00s, 30550.00 req/s, 3.62MB/s
requests: 30550 total, 30614 started, 30550 done, 30550 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 30550 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 3.62MB (3795862) total, 485.91KB (497568) headers (space savings 78.82%), 1.63MB (1680195) data
`

func TestParseH2load(t *testing.T) {
	r := newRun(context.Background(), false)
	var s sample
	p := wirePoint{kind: kindGRPC, conns: 8, streams: 8}
	requests, seconds := s.h2loaded(r, p, h2loadOutput)
	// An answer is as long as it must be, or it is none: 55 bytes fit 30,549 times.
	if requests != 1680195.0/55 || seconds != 1 || s.Errors != 1 {
		t.Errorf("%v requests in %v s, %d errors", requests, seconds, s.Errors)
	}
	var log []byte
	for i := range 1000 {
		log = append(log, []byte("1700000000000000\t200\t"+number3(i)+"\n")...)
	}
	s.percentiles(append(log, "1700000000000000\t-1\t99999\n"...))
	if s.P50 != 500 || s.P99 != 990 || s.P999 != 999 {
		t.Errorf("p50 %v, p99 %v, p99.9 %v", s.P50, s.P99, s.P999)
	}
}

func number3(n int) string {
	return string([]byte{byte('0' + n/100), byte('0' + n/10%10), byte('0' + n%10)})
}

// The client of our own against the application of our own.
func TestTalk(t *testing.T) {
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	echo, calls := listen(), listen()
	s := grpc.NewServer(grpc.ForceServerCodec(raw{}))
	s.RegisterService(&service, nil)
	var running sync.WaitGroup
	running.Go(func() { serveEcho(echo) })
	running.Go(func() { s.Serve(calls) })
	defer running.Wait()
	defer s.Stop()
	defer echo.Close()
	for mode, addr := range map[string]net.Listener{"echo": echo, "bulk": echo, "churn": echo, "talk": calls, "watch": calls} {
		all, took, err := talk{mode: mode, addr: addr.Addr().String(), many: 3, duration: 10 * time.Millisecond}.run()
		if err != nil || took <= 0 || slices.ContainsFunc(all, func(n tally) bool { return n.messages == 0 || n.bytes == 0 }) {
			t.Errorf("%s: %+v in %v, %v", mode, all, took, err)
		}
	}
}

func TestWirePointsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range wirePoints {
		if seen[p.name()] {
			t.Errorf("two points are called %s", p.name())
		}
		seen[p.name()] = true
	}
}
