package main

import (
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
)

// decided returns how often the proxy decided so about a service.
func (m *workload) decided(service, decision string) (n uint64) {
	for _, d := range m.report().Counters.Decisions {
		if d.Service == service && d.Decision == decision {
			n += d.Count
		}
	}
	return n
}

// policy gives a service a policy.
func (w *world) policy(service string, p assay.TrafficPolicy) {
	w.mu.Lock()
	s := w.services["bank/"+service]
	s.Policy = &p
	w.services["bank/"+service] = s
	w.mu.Unlock()
	w.publish()
}

func TestTimeoutsAndRetries(t *testing.T) {
	w := newWorld(t)
	client, one, two := w.workload("client"), w.workload("server"), w.workload("server")
	var slow, busy atomic.Int64
	handler := func() http.Handler {
		mux := http.NewServeMux()
		mux.HandleFunc("/ok", func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "ok") })
		mux.HandleFunc("/hang", func(rw http.ResponseWriter, r *http.Request) {
			slow.Add(1)
			<-r.Context().Done()
			slow.Add(-1)
		})
		mux.HandleFunc("/busy", func(rw http.ResponseWriter, r *http.Request) {
			if busy.Add(1)%2 == 1 {
				rw.WriteHeader(503)
				return
			}
			io.WriteString(rw, "at last")
		})
		return mux
	}
	port := one.web(0, handler())
	two.web(int(port), handler())
	vip := w.service("web", 80, assay.Detect, port, one, two)
	w.policy("web", assay.TrafficPolicy{
		Timeout: 2 * time.Second, TryTimeout: 200 * time.Millisecond,
		Retry: assay.RetryPolicy{Attempts: 1, Codes: []int{503}, Backoff: 5 * time.Millisecond},
	})
	c, base := client.browser(), "http://"+vip.String()
	eventually(t, "the policy to be in use", func() bool {
		start := time.Now()
		status, _ := get(t, c, base+"/hang")
		return status == 504 && time.Since(start) < 5*time.Second
	})
	eventually(t, "what was given up to be cancelled at the application", func() bool { return slow.Load() == 0 })
	busy.Store(0)
	if status, body := get(t, c, base+"/busy"); status != 200 || body != "at last" || busy.Load() != 2 {
		t.Errorf("a GET: %d %q after %d tries", status, body, busy.Load())
	}
	busy.Store(0)
	resp, err := c.Post(base+"/busy", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 503 || busy.Load() != 1 {
		t.Errorf("a POST: %d after %d tries", resp.StatusCode, busy.Load())
	}
	for _, decision := range []string{"retry-timeout", "try-timeout", "retry-status"} {
		if client.decided("bank/web", decision) == 0 {
			t.Errorf("%s was not counted: %v", decision, client.report().Counters.Decisions)
		}
	}
}

// TestEjectedAndRestored: an endpoint that answers nothing but 500 gets nothing for a
// while, and is tried again.
func TestEjectedAndRestored(t *testing.T) {
	w := newWorld(t)
	client, good, bad := w.workload("client"), w.workload("server"), w.workload("server")
	var broken atomic.Bool
	var asked atomic.Int64
	broken.Store(true)
	port := good.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "good") }))
	bad.web(int(port), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if broken.Load() {
			rw.WriteHeader(500) // quicker than the other: without ejection it would draw requests
			return
		}
		io.WriteString(rw, "bad")
	}))
	vip := w.service("web", 80, assay.Detect, port, good, bad)
	w.policy("web", assay.TrafficPolicy{Ejection: assay.EjectionPolicy{BreakerPolicy: assay.BreakerPolicy{BaseTime: time.Second}}, SlowStart: -1})
	c, base := client.browser(), "http://"+vip.String()
	eventually(t, "the endpoint to be ejected", func() bool {
		for range 20 {
			get(t, c, base+"/")
		}
		return client.decided("bank/web", "eject") == 1
	})
	unfit := client.report().Counters.Unfit
	if len(unfit) != 1 || unfit[0].Workload != bad.ID || !unfit[0].Ejected || unfit[0].Why != "5 failures in a row" || unfit[0].Service != "bank/web" {
		t.Errorf("reported %+v", unfit)
	}
	before := asked.Load()
	for range 100 {
		get(t, c, base+"/")
	}
	if n := asked.Load() - before; n > 2 {
		t.Errorf("it was asked %d more times in a hundred", n)
	}
	broken.Store(false)
	eventually(t, "the endpoint to be fit again", func() bool {
		get(t, c, base+"/")
		return client.decided("bank/web", "restore") > 0
	})
	if len(client.report().Counters.Unfit) != 0 {
		t.Error("it is still reported")
	}
}

func TestRateAndConnectionLimits(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	port := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "ok") }))
	vip := w.service("web", 80, assay.Detect, port, server)
	w.policy("web", assay.TrafficPolicy{Inbound: assay.InboundPolicy{RateLimit: 1, RateBurst: 5}})
	c := client.browser()
	var refused *http.Response
	eventually(t, "the limit to be in use", func() bool {
		resp, err := c.Get("http://" + vip.String())
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		refused = resp
		return resp.StatusCode == 429
	})
	if refused.Header.Get("Retry-After") == "" || refused.Header.Get("Assay-Error") != "rate-limited" {
		t.Errorf("refused with %v", refused.Header)
	}
	if server.decided("bank/web", "rate-limited") == 0 {
		t.Error("not counted")
	}
	echoPort := server.serve(0, echo)
	tcp := w.service("echo", 7, assay.Opaque, echoPort, server)
	w.policy("echo", assay.TrafficPolicy{Inbound: assay.InboundPolicy{MaxConnections: 2}})
	var open []net.Conn
	eventually(t, "the third connection to be refused", func() bool {
		for _, c := range open {
			c.Close()
		}
		open = nil
		for range 2 {
			conn, err := client.dial(tcp)
			if err != nil {
				return false
			}
			open = append(open, conn)
			if _, err := io.WriteString(conn, "x"); err != nil {
				return false
			}
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				return false
			}
		}
		third, err := client.dial(tcp) // may be reset before connect returns
		if err == nil {
			defer third.Close()
			io.WriteString(third, "x")
			third.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = io.ReadFull(third, make([]byte, 1))
		}
		return err != nil && server.decided("bank/echo", "too-many") > 0
	})
	for _, c := range open {
		c.Close()
	}
}

// TestCircuit: a service that whole answers nothing but failures is asked no more, says
// its owner, but for one request now and then; those who ask are told so at once.
func TestCircuit(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	var broken atomic.Bool
	var asked atomic.Int64
	broken.Store(true)
	port := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if broken.Load() {
			rw.WriteHeader(500)
			return
		}
		io.WriteString(rw, "ok")
	}))
	vip := w.service("web", 80, assay.Detect, port, server)
	w.policy("web", assay.TrafficPolicy{Circuit: assay.BreakerPolicy{ConsecutiveFailures: 3, BaseTime: 3 * time.Second}})
	c, base := client.browser(), "http://"+vip.String()
	var refused *http.Response
	eventually(t, "the circuit to open", func() bool {
		resp, err := c.Get(base)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		refused = resp
		return resp.StatusCode == 503
	})
	if refused.Header.Get("Assay-Error") != "circuit-open" || refused.Header.Get("Retry-After") == "" {
		t.Errorf("refused with %v", refused.Header)
	}
	before := asked.Load()
	for range 200 {
		get(t, c, base)
	}
	if n := asked.Load() - before; n > 20 {
		t.Errorf("the application was asked %d more times in two hundred", n)
	}
	if client.decided("bank/web", "circuit-open") != 1 || client.decided("bank/web", "circuit-refused") < 100 {
		t.Errorf("counted %v", client.report().Counters.Decisions)
	}
	unfit := client.report().Counters.Unfit
	if !slices.ContainsFunc(unfit, func(u assay.Unfit) bool {
		return u.Addr == assay.WholeService && u.Service == "bank/web" && u.Workload == "" && u.Why != ""
	}) {
		t.Errorf("reported %+v", unfit)
	}
	broken.Store(false)
	eventually(t, "the circuit to close", func() bool {
		status, _ := get(t, c, base)
		return status == 200 && client.decided("bank/web", "circuit-close") == 1
	})
	if status, body := get(t, c, base); status != 200 || body != "ok" {
		t.Errorf("afterwards: %d %q", status, body)
	}
}

// TestHeldBack: what an endpoint refuses as too much its client's proxy asks no more for,
// in either version of HTTP, and all is as before when there is room.
func TestHeldBack(t *testing.T) {
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			client, server := w.workload("client"), w.workload("server")
			var release atomic.Pointer[chan struct{}]
			gate := make(chan struct{})
			release.Store(&gate)
			handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				select {
				case <-*release.Load():
					io.WriteString(rw, "ok")
				case <-r.Context().Done():
				}
			})
			var port uint16
			c := client.browser()
			if version == "HTTP/2.0" {
				port, c = server.web2(0, handler), client.browser2()
			} else {
				port = server.web(0, handler)
			}
			vip := w.service("web", 80, assay.Detect, port, server)
			w.policy("web", assay.TrafficPolicy{Retry: assay.RetryPolicy{Attempts: -1}, Inbound: assay.InboundPolicy{MaxConcurrency: 4, MinConcurrency: 1}})
			var asking sync.WaitGroup
			var served, refused atomic.Int64
			ask := func() {
				resp, err := c.Get("http://" + vip.String())
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				switch {
				case resp.StatusCode == 200 && resp.Proto == version:
					served.Add(1)
				case resp.StatusCode == 503 && resp.Header.Get("Assay-Error") == "overloaded" && resp.Header.Get("Retry-After") != "":
					refused.Add(1)
				default:
					t.Errorf("%s %d %v", resp.Proto, resp.StatusCode, resp.Header)
				}
			}
			eventually(t, "requests to be held back", func() bool {
				for range 10 {
					asking.Go(ask)
				}
				return client.decided("bank/web", "held-back") > 0
			})
			if client.decided("bank/web", "throttle") == 0 || server.decided("bank/web", "too-many")+server.decided("bank/web", "shed") == 0 {
				t.Errorf("decided %v and %v", client.report().Counters.Decisions, server.report().Counters.Decisions)
			}
			close(gate)
			asking.Wait()
			if served.Load() == 0 || refused.Load() == 0 {
				t.Errorf("%d served, %d refused", served.Load(), refused.Load())
			}
			before := refused.Load()
			for range 50 {
				ask()
			}
			if refused.Load() != before {
				t.Errorf("%d refused where there is room", refused.Load()-before)
			}
		})
	}
}
