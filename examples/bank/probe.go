package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// Probe measures how long a server that speaks first takes to be heard: from the
// call of connect() to the first byte, each time on a new connection.
type Probe struct {
	Target string // host:port
	Count  int
	Want   string // what the first line begins with
}

// ProbeSummary is what a probe prints, in milliseconds.
type ProbeSummary struct {
	Target string    `json:"target"`
	MS     []float64 `json:"first_byte_ms"` // in the order they were measured
	P50    float64   `json:"p50"`
	Max    float64   `json:"max"`
}

// Run connects Count times, one after the other.
func (p *Probe) Run(ctx context.Context, w io.Writer) error {
	s := ProbeSummary{Target: p.Target}
	for range p.Count {
		d, err := p.once(ctx)
		if err != nil {
			return fmt.Errorf("probe %s: %w", p.Target, err)
		}
		s.MS = append(s.MS, millis(d))
	}
	sorted := slices.Sorted(slices.Values(s.MS))
	s.P50, s.Max = sorted[(len(sorted)-1)/2], sorted[len(sorted)-1]
	return json.NewEncoder(w).Encode(&s)
}

func (p *Probe) once(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	start := time.Now()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", p.Target)
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
