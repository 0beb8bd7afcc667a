package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
)

// plant is an application whose own pace is the clock of a test: each worker needs a
// beat for a request, and a beat without one is lost. Load is so many requests for each
// beat, and what comes too late is counted in beats. So ten times its capacity is ten
// times its capacity on a machine of any speed, however busy.
type plant struct {
	workers int
	work    time.Duration // of a beat, at least
	patient int64         // beats that a client waits

	beats   chan struct{} // of all workers; who takes them decides how fast they go
	queue   chan chan struct{}
	arrived atomic.Int64 // requests of which the application knows, or that were refused
	busy    atomic.Int64 // beats with a request
}

func newPlant(t *testing.T, workers int, work time.Duration) *plant {
	perSecond := int64(workers) * int64(time.Second/work)
	p := &plant{workers: workers, work: work, patient: 3 * perSecond / 2, beats: make(chan struct{}), queue: make(chan chan struct{}, 1<<16)}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for range workers {
		running.Go(func() { p.labour(ctx) })
	}
	t.Cleanup(func() { stop(); running.Wait() })
	return p
}

func (p *plant) labour(ctx context.Context) {
	for {
		time.Sleep(p.work) // what a request takes
		select {
		case answer := <-p.queue: // also when nobody wants the answer any more
			p.busy.Add(1)
			close(answer)
		default:
		}
		select {
		case p.beats <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}

// ServeHTTP waits for a worker.
func (p *plant) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	answer := make(chan struct{})
	p.arrived.Add(1)
	p.queue <- answer
	select {
	case <-answer:
		io.WriteString(rw, "ok")
	case <-r.Context().Done():
	}
}

// outcome is what became of the load after its first beats.
type outcome struct {
	beats   int64
	good    int64           // answered in time
	late    int64           // admitted, and given up
	refused int64           // at once
	took    []int64         // beats
	wall    []time.Duration // the same by the clock on the wall, which nothing depends on
}

func (o *outcome) perBeat() float64 { return float64(o.good) / float64(o.beats) }

// load asks perBeat times for each of so many beats, and leaves the first ones out.
func (p *plant) load(t *testing.T, c *http.Client, url string, perBeat float64, beats, first int64) (out outcome) {
	var mu sync.Mutex
	var now atomic.Int64
	var asking sync.WaitGroup
	type waiting struct {
		until int64
		end   context.CancelFunc
	}
	var clients []waiting
	ask := func() {
		came, start := now.Load(), time.Now()
		ctx, end := context.WithCancel(t.Context())
		clients = append(clients, waiting{came + p.patient, end})
		asking.Go(func() {
			defer end()
			req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
			resp, err := c.Do(req)
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			at := now.Load()
			counts := at >= first && at < beats
			switch {
			case errors.Is(err, context.Canceled):
				if came >= first {
					out.late++
				}
			case err != nil:
				t.Error(err)
			case resp.StatusCode == 503 && resp.Header.Get("Assay-Error") == "overloaded" && resp.Header.Get("Retry-After") != "":
				p.arrived.Add(1)
				out.refused++
			case resp.StatusCode != 200:
				t.Errorf("status %d %v", resp.StatusCode, resp.Header)
			case counts:
				out.good++
				out.took, out.wall = append(out.took, at-came), append(out.wall, time.Since(start))
			}
		})
	}
	beat := func() {
		<-p.beats
		for n := now.Add(1); len(clients) > 0 && clients[0].until <= n; clients = clients[1:] {
			clients[0].end()
		}
	}
	// What is on its way is bounded: when the machine cannot carry requests as fast as
	// they are asked, the application waits for it, and both are slower.
	settled, asked, due := p.arrived.Load(), int64(0), 0.0
	for now.Load() < beats {
		beat()
		for due += perBeat; due >= 1; due-- {
			for asked-(p.arrived.Load()-settled) > 512 {
				time.Sleep(time.Millisecond)
			}
			ask()
			asked++
		}
	}
	ended := make(chan struct{})
	go func() { asking.Wait(); close(ended) }()
	for {
		select {
		case <-ended:
			out.beats = beats - first
			return out
		case <-p.beats:
			for n := now.Add(1); len(clients) > 0 && clients[0].until <= n; clients = clients[1:] {
				clients[0].end()
			}
		}
	}
}

func at[T int64 | time.Duration](list []T, percent int) T {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[len(list)*percent/100]
}

// TestOverload: an application is asked for ten times as much as it can do. It goes on
// doing what it can, and who is admitted is answered in time.
func TestOverload(t *testing.T) {
	if os.Getenv("ASSAY_E2E") == "" {
		t.Skip("takes a minute: ASSAY_E2E=1 runs it, and so does make test")
	}
	for _, c := range []struct {
		workers int
		work    time.Duration
	}{{4, 20 * time.Millisecond}, {5, 10 * time.Millisecond}} {
		perSecond := int64(c.workers) * int64(time.Second/c.work)
		t.Run(fmt.Sprintf("%d a second", perSecond), func(t *testing.T) {
			w := newWorld(t)
			client, server := w.workload("client"), w.workload("server")
			p := newPlant(t, c.workers, c.work)
			vip := w.service("web", 80, assay.HTTP1, server.web(0, p), server)
			url, b := "http://"+vip.String(), client.browser()
			b.Timeout = 0
			b.Transport.(*http.Transport).MaxIdleConnsPerHost = 4096
			p.load(t, b, url, 0.3, perSecond, 0) // what it is like when nothing waits
			peak := p.load(t, b, url, 0.9, 4*perSecond, perSecond)
			if peak.refused > 0 {
				t.Errorf("%d were refused below its capacity", peak.refused)
			}
			// At first the application is busy with what it got before the limit was found.
			before, begin, beats := p.busy.Load(), time.Now(), 14*perSecond
			over := p.load(t, b, url, 10, beats, beats/2)
			t.Logf("of %d beats at 0.9 of its capacity %.2f answered a request in time, at ten times that %.2f: %.2f of the peak; %d given up, %d refused at once; p99 %d beats, %v; %.0f beats a second, %d of %d busy",
				over.beats, peak.perBeat(), over.perBeat(), over.perBeat()/peak.perBeat(), over.late, over.refused,
				at(over.took, 99), at(over.wall, 99).Round(time.Millisecond), float64(beats)/time.Since(begin).Seconds(), p.busy.Load()-before, beats)
			if over.perBeat() < 0.8*peak.perBeat() {
				t.Errorf("under ten times its capacity %.2f good answers a beat, %.2f at its capacity", over.perBeat(), peak.perBeat())
			}
			if over.late*100 > over.late+over.good {
				t.Errorf("%d of %d that were admitted were not answered within %d beats", over.late, over.late+over.good, p.patient)
			}
			if server.decided("bank/web", "shed") == 0 {
				t.Error("nothing was counted as shed")
			}
			// Most of what is too much does not even go there.
			shed, held := server.decided("bank/web", "shed"), client.decided("bank/web", "held-back")
			t.Logf("%d refused by the server's proxy, %d held back by the client's", shed, held)
			if held == 0 {
				t.Error("the client's proxy has held nothing back")
			}
		})
	}
}
