package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// Probe measures how long a server that speaks first takes to be heard: from the
// call of connect() to the first byte, each time on a new connection, the name looked
// up before. For
// comparison it does the same with a NATS server of its own on loopback, where
// nothing is between them.
type Probe struct {
	Target string // host:port
	Count  int
	Want   string    // what the first line begins with
	Begin  io.Reader // begins when a byte or the end can be read; nil: at once
}

// ProbeSummary is what a probe prints.
type ProbeSummary struct {
	Target string `json:"target"`
	Probed Times  `json:"probed"`
	Direct Times  `json:"direct"`
}

// Times are in milliseconds.
type Times struct {
	MS  []float64 `json:"first_byte_ms"` // in the order they were measured
	P50 float64   `json:"p50"`
	Max float64   `json:"max"`
}

// Run connects Count times to each, one connection after the other.
func (p *Probe) Run(ctx context.Context, w io.Writer) error {
	s := ProbeSummary{Target: p.Target}
	var err error
	if p.Begin != nil {
		if _, err := p.Begin.Read(make([]byte, 1)); err != nil && err != io.EOF {
			return err
		}
	}
	if s.Probed, err = p.measure(ctx, p.Target); err != nil {
		return err
	}
	own, err := newEvents("127.0.0.1:0")
	if err != nil {
		return err
	}
	own.Start()
	defer own.WaitForShutdown()
	defer own.Shutdown()
	if !own.ReadyForConnections(10 * time.Second) {
		return errors.New("probe: the server for comparison does not start")
	}
	direct := Probe{Count: p.Count, Want: "INFO "}
	if s.Direct, err = direct.measure(ctx, own.Addr().String()); err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(&s)
}

func (p *Probe) measure(ctx context.Context, target string) (t Times, err error) {
	for range p.Count {
		d, err := p.once(ctx, target)
		if err != nil {
			return t, fmt.Errorf("probe %s: %w", target, err)
		}
		t.MS = append(t.MS, millis(d))
	}
	sorted := slices.Sorted(slices.Values(t.MS))
	t.P50, t.Max = sorted[(len(sorted)-1)/2], sorted[len(sorted)-1]
	return t, nil
}

func (p *Probe) once(ctx context.Context, target string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	addr, err := net.ResolveTCPAddr("tcp", target)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	r := bufio.NewReader(conn)
	if _, err := r.Peek(1); err != nil {
		return 0, err
	}
	took := time.Since(start)
	line, err := r.ReadString('\n')
	if err != nil {
		return 0, err
	}
	if !strings.HasPrefix(line, p.Want) {
		return 0, fmt.Errorf("the server says %.40q, want %q", line, p.Want)
	}
	return took, nil
}
