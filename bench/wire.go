package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Loads of HTTP/2, gRPC and opaque bytes.

// Kinds of points: what the client's connection speaks.
const (
	kindHTTP2  = "h2"
	kindGRPC   = "grpc"
	kindStream = "stream"
	kindTCP    = "tcp"
)

// wirePoint is one load that is not wrk's.
type wirePoint struct {
	kind    string
	title   string
	conns   int
	streams int    // of each connection, at a time
	mode    string // of talk
}

// name is how the point is chosen and found in the results.
func (p wirePoint) name() string {
	if p.mode != "" {
		return fmt.Sprintf("%s-%s-%d", p.kind, p.mode, p.conns*p.streams)
	}
	return fmt.Sprintf("%s-%dx%d", p.kind, p.conns, p.streams)
}

var wirePoints = []wirePoint{
	{kindHTTP2, "HTTP/2 GET, 1 connection, 1 stream", 1, 1, ""},
	{kindHTTP2, "HTTP/2 GET, 1 connection, 64 streams", 1, 64, ""},
	{kindHTTP2, "HTTP/2 GET, 16 connections, 16 streams each", 16, 16, ""},
	{kindGRPC, "gRPC unary, 1 connection, 1 call", 1, 1, ""},
	{kindGRPC, "gRPC unary, 1 connection, 64 calls", 1, 64, ""},
	{kindGRPC, "gRPC unary, 8 connections, 8 calls each", 8, 8, ""},
	{kindGRPC, "gRPC unary, 64 connections, 1 call each", 64, 1, ""},
	{kindStream, "gRPC, 64 streams both ways, a message at a time", 1, 64, "talk"},
	{kindStream, "gRPC, 16 streams from the server, as fast as they go", 1, 16, "watch"},
	{kindTCP, "opaque TCP, 64 connections, 50 bytes there and back", 64, 1, "echo"},
	{kindTCP, "opaque TCP, 4 connections, 1 MiB there and back", 4, 1, "bulk"},
	{kindTCP, "opaque TCP, a connection for each 50 bytes there and back, 16 at a time", 16, 1, "churn"},
}

// grpcBody is one message as it is framed in a body.
var grpcBody = append([]byte{0, 0, 0, 0, byte(len(payload))}, payload...)

const (
	grpcBodyFile = "/tmp/message"
	h2loadLog    = "/tmp/h2load.log"
)

// client returns the command of the point's client.
func (p wirePoint) client(r *run, c *contender, d time.Duration) []string {
	port := map[string]int{kindHTTP2: portHTTP2, kindGRPC: portGRPC, kindStream: portGRPC, kindTCP: portEcho}[p.kind]
	if p.mode != "" {
		return []string{r.self, "talk", "-mode", p.mode, "-addr", fmt.Sprintf("%s:%d", c.host, port), "-many", strconv.Itoa(p.conns * p.streams), "-duration", d.String()}
	}
	argv := []string{"h2load", "-t1", "-c" + strconv.Itoa(p.conns), "-m" + strconv.Itoa(p.streams), "--log-file=" + h2loadLog}
	if d < time.Second {
		argv = append(argv, "-n"+strconv.Itoa(p.conns*p.streams)) // once each
	} else {
		argv = append(argv, "-D"+strconv.Itoa(int(d.Round(time.Second)/time.Second)))
	}
	if p.kind == kindGRPC {
		return append(argv, "-d", grpcBodyFile, "-H", "content-type: application/grpc", "-H", "te: trailers", c.url(port)+methodUnary)
	}
	return append(argv, c.url(port)+"/")
}

// measureWire is measure for such a load.
func (c *contender) measureWire(r *run, p wirePoint, d time.Duration) sample {
	d = max(d, time.Second)
	os.Remove(r.lab.Path(h2loadLog))
	out, used, s := c.watch(r, d, p.client(r, c, d)...)
	requests, bytes, took := 0.0, 0.0, 0.0
	if p.mode != "" {
		requests, bytes, took = s.talked(r, out)
	} else {
		requests, took = s.h2loaded(r, p, out)
		log, err := os.ReadFile(r.lab.Path(h2loadLog))
		if err != nil {
			r.Fatalf("h2load's log: %v", err)
		}
		s.percentiles(log)
	}
	s.account(r, c, p.name(), used, requests, bytes, took)
	return s
}

var (
	talkedLine  = regexp.MustCompile(`talked (\d+) messages (\d+) bytes in ([\d.]+) s; p50 (\d+) p99 (\d+) p99.9 (\d+) us`)
	h2loadTook  = regexp.MustCompile(`finished in ([\d.]+)(\w+),`)
	h2loadCount = regexp.MustCompile(`requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded`)
	h2loadData  = regexp.MustCompile(`\((\d+)\) data`)
)

func (s *sample) talked(r *run, out string) (messages, bytes, seconds float64) {
	m := talkedLine.FindStringSubmatch(out)
	if m == nil {
		r.Fatalf("talk: output not understood:\n%s", out)
	}
	s.P50, s.P99, s.P999 = number(m[4]), number(m[5]), number(m[6])
	return number(m[1]), number(m[2]), number(m[3])
}

// h2loaded takes an answer for one that is as long as it must be: a gRPC call that
// failed has a status of 200, too.
func (s *sample) h2loaded(r *run, p wirePoint, out string) (requests, seconds float64) {
	count, took, data := h2loadCount.FindStringSubmatch(out), h2loadTook.FindStringSubmatch(out), h2loadData.FindStringSubmatch(out)
	if count == nil || took == nil || data == nil {
		r.Fatalf("h2load: output not understood:\n%s", out)
	}
	size := len(smallBody)
	if p.kind == kindGRPC {
		size = len(grpcBody)
	}
	requests = min(number(count[3]), number(data[1])/float64(size))
	s.Errors = int(number(count[2]) - requests)
	return requests, micros(took[1], took[2]) / 1e6
}

// percentiles reads h2load's log: when a request began, its status, its microseconds.
func (s *sample) percentiles(log []byte) {
	var took []time.Duration
	for line := range bytes.Lines(log) {
		if f := strings.Fields(string(line)); len(f) >= 3 && f[1] == "200" {
			took = append(took, time.Duration(number(f[2]))*time.Microsecond)
		}
	}
	slices.Sort(took)
	us := func(q float64) float64 { return float64(percentile(took, q).Microseconds()) }
	s.P50, s.P99, s.P999 = us(0.5), us(0.99), us(0.999)
}
