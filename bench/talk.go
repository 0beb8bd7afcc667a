package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The client of what neither wrk nor h2load speaks: gRPC streams and opaque bytes. It is
// this very program, started as `bench talk` where the client is, and prints what talked
// parses.

// talk is one run of it.
type talk struct {
	mode     string // "echo", "bulk", "churn": opaque bytes; "talk", "watch": gRPC streams
	addr     string
	many     int // connections, or streams of one connection
	duration time.Duration
}

// tally is what one connection or stream has found.
type tally struct {
	messages int
	bytes    int64
	took     []time.Duration // by each message, where there is a question for each answer
}

func talkMain(args []string) error {
	var t talk
	f := flag.NewFlagSet("talk", flag.ContinueOnError)
	f.StringVar(&t.mode, "mode", "echo", "")
	f.StringVar(&t.addr, "addr", "", "")
	f.IntVar(&t.many, "many", 1, "")
	f.DurationVar(&t.duration, "duration", time.Second, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	all, took, err := t.run()
	if err != nil {
		return fmt.Errorf("%s %s: %w", t.mode, t.addr, err)
	}
	var sum tally
	for _, one := range all {
		sum.messages += one.messages
		sum.bytes += one.bytes
		sum.took = append(sum.took, one.took...)
	}
	slices.Sort(sum.took)
	fmt.Printf("talked %d messages %d bytes in %.6f s; p50 %d p99 %d p99.9 %d us\n", sum.messages, sum.bytes, took.Seconds(),
		percentile(sum.took, 0.5).Microseconds(), percentile(sum.took, 0.99).Microseconds(), percentile(sum.took, 0.999).Microseconds())
	return nil
}

// percentile of a sorted list; 0 of none.
func percentile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// run has every connection or stream work until the time is over.
func (t talk) run() ([]tally, time.Duration, error) {
	one := t.echo
	switch t.mode {
	case "churn":
		one = t.churn
	case "talk", "watch":
		conn, err := grpc.NewClient("passthrough:///"+t.addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
		if err != nil {
			return nil, 0, err
		}
		defer conn.Close()
		one = func(over time.Time, n *tally) error { return t.stream(conn, over, n) }
	}
	all, errs := make([]tally, t.many), make([]error, t.many)
	began := time.Now()
	var running sync.WaitGroup
	for i := range all {
		running.Go(func() { errs[i] = one(began.Add(t.duration), &all[i]) })
	}
	running.Wait()
	return all, time.Since(began), errors.Join(errs...)
}

// echo sends and reads back, one message at a time, or a MiB at a time.
func (t talk) echo(over time.Time, n *tally) error {
	c, err := net.DialTimeout("tcp", t.addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(over.Add(10 * time.Second))
	message := append([]byte{0}, payload[1:]...) // of no protocol that anybody knows
	if t.mode == "bulk" {
		message = append([]byte{0}, strings.Repeat("x", bulkSize-1)...)
	}
	answer := make([]byte, len(message))
	for n.messages == 0 || time.Now().Before(over) {
		asked := time.Now()
		sent := make(chan error, 1)
		if len(message) <= len(payload) {
			_, err = c.Write(message)
			sent <- err
		} else {
			go func() {
				_, err := c.Write(message)
				sent <- err
			}()
		}
		if _, err := io.ReadFull(c, answer); err != nil {
			return err
		}
		if err := <-sent; err != nil {
			return err
		}
		n.messages++
		n.bytes += 2 * int64(len(message)) // there and back
		n.took = append(n.took, time.Since(asked))
	}
	return nil
}

// churn makes a connection for each message. The application closes it first, so that no
// port of the client is kept by what was.
func (t talk) churn(over time.Time, n *tally) error {
	message := append([]byte{last}, payload[1:]...)
	for n.messages == 0 || time.Now().Before(over) {
		asked := time.Now()
		c, err := net.DialTimeout("tcp", t.addr, 5*time.Second)
		if err != nil {
			return err
		}
		c.SetDeadline(asked.Add(10 * time.Second))
		_, err = c.Write(message)
		answer, readErr := io.ReadAll(c)
		c.Close()
		if err := errors.Join(err, readErr); err != nil {
			return err
		}
		if !bytes.Equal(answer, message) {
			return fmt.Errorf("a message came back as %q", answer)
		}
		n.messages++
		n.bytes += 2 * int64(len(message))
		n.took = append(n.took, time.Since(asked))
	}
	return nil
}

// stream is one gRPC stream.
func (t talk) stream(conn *grpc.ClientConn, over time.Time, n *tally) error {
	ctx, cancel := context.WithDeadline(context.Background(), over.Add(10*time.Second))
	defer cancel()
	method, desc := methodTalk, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	if t.mode == "watch" {
		method, desc = methodWatch, &grpc.StreamDesc{ServerStreams: true}
	}
	s, err := conn.NewStream(ctx, desc, method)
	if err != nil {
		return err
	}
	message, answer := []byte(payload), []byte(nil)
	if t.mode == "watch" {
		if err := errors.Join(s.SendMsg(&message), s.CloseSend()); err != nil {
			return err
		}
	}
	for n.messages == 0 || time.Now().Before(over) {
		asked := time.Now()
		if t.mode == "talk" {
			if err := s.SendMsg(&message); err != nil {
				return err
			}
		}
		if err := s.RecvMsg(&answer); err != nil {
			return err
		}
		if string(answer) != payload {
			return fmt.Errorf("a message came back as %q", answer)
		}
		n.messages++
		n.bytes += int64(len(answer))
		if t.mode == "talk" {
			n.took = append(n.took, time.Since(asked))
		}
	}
	if t.mode == "talk" {
		s.CloseSend()
		if err := s.RecvMsg(&answer); err != io.EOF {
			return fmt.Errorf("the stream's end: %w", err)
		}
	}
	return nil
}
