package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// repeat says its name to whoever connects, and then each line that it hears.
func repeat(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if _, err := fmt.Fprintf(c, "%s\n", name); err == nil {
				io.Copy(c, c)
			}
		}()
	}
}

// patience bounds one question.
const patience = 20 * time.Second

// steady asks url by new connections and by one that is kept, and talks over so many
// connections to raw that are held for ever. It says, each in a line:
//
//	FAILED fresh: WHY          a request by a new connection that was not answered
//	FAILED kept: WHY           one by the connection that is kept
//	MOVED kept                 that was closed between two requests, and is another one now
//	BROKEN held HOST: WHY      a connection that is held broke; it was HOST's
//	answered FRESH KEPT HELD   every second, how many answers there were
func steady(ctx context.Context, url, raw string, connections int) {
	var all sync.WaitGroup
	var fresh, kept, held atomic.Int64
	all.Go(func() {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
		every(ctx, 20*time.Millisecond, func() { say(ctx, &fresh, "fresh", ask(ctx, client, url)) })
	})
	all.Go(func() {
		client, last := &http.Client{Transport: &http.Transport{}, Timeout: patience}, ""
		trace := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
			if at := info.Conn.LocalAddr().String(); at != last {
				if last != "" {
					fmt.Println("MOVED kept")
				}
				last = at
			}
		}})
		every(ctx, 20*time.Millisecond, func() { say(ctx, &kept, "kept", ask(trace, client, url)) })
	})
	for range connections {
		all.Go(func() {
			every(ctx, 100*time.Millisecond, func() {
				if host, err := hold(ctx, raw, &held); err != nil && ctx.Err() == nil {
					fmt.Printf("BROKEN held %s: %v\n", host, err)
				}
			})
		})
	}
	all.Go(func() {
		every(ctx, time.Second, func() { fmt.Printf("answered %d %d %d\n", fresh.Load(), kept.Load(), held.Load()) })
	})
	all.Wait()
}

func say(ctx context.Context, answered *atomic.Int64, kind string, err error) {
	if err != nil && ctx.Err() == nil {
		fmt.Printf("FAILED %s: %v\n", kind, err)
		return
	}
	answered.Add(1)
}

func every(ctx context.Context, pause time.Duration, do func()) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			do()
		}
	}
}

// hold talks over one connection until it breaks.
func hold(ctx context.Context, raw string, answered *atomic.Int64) (host string, err error) {
	dialer := net.Dialer{Timeout: patience}
	c, err := dialer.DialContext(ctx, "tcp", raw)
	if err != nil {
		return "", err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	r := bufio.NewReader(c)
	read := func() (string, error) {
		c.SetDeadline(time.Now().Add(patience))
		line, err := r.ReadString('\n')
		return strings.TrimSpace(line), err
	}
	if host, err = read(); err != nil {
		return "", err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return host, nil
		case <-tick.C:
		}
		c.SetDeadline(time.Now().Add(patience))
		if _, err := fmt.Fprintf(c, "in the clear %d\n", n); err != nil {
			return host, err
		}
		line, err := read()
		if err != nil {
			return host, err
		}
		if want := fmt.Sprintf("in the clear %d", n); line != want {
			return host, fmt.Errorf("%q came back for %q", line, want)
		}
		answered.Add(1)
	}
}
