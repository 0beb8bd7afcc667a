// Command echo is what the cluster's suites run in pods: a server that tells who
// asks whom, and a client.
//
//	echo serve [ADDRESS [RAW]]  HTTP, on :8080 if nothing is said; /slow/SECONDS answers a line in
//	                            each; at RAW it says its name and then each line that it hears
//	echo health ADDRESS       gRPC's own health service
//	echo get URL [TIMES]      prints the answers
//	echo try URL              the same, with five seconds for it
//	echo greet ADDRESS        begins TLS with a server, whoever it is, with five seconds for it
//	echo load URL             asks for ever, by new connections and by one that stays open,
//	                          and prints what fails
//	echo steady URL RAW [N]   the same, and a connection to RAW that is held, or N of them; what
//	                          it says is in steady.go
//	echo lookup NAME          prints the addresses of a name
//	echo cat FILE             prints a file
//	echo escape ADDRESS       sends TCP of no connection to port 443 there, by a raw socket
//	echo sleep                waits for its end
//	tar cf - FILE             under that name: what kubectl copies files with
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	do := func() error { return run(ctx, append(os.Args[1:], "", "", "")) }
	if filepath.Base(os.Args[0]) == "tar" {
		do = func() error { return pack(os.Args[1:]) }
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch args[0] {
	case "serve":
		return serve(ctx, args[1], args[2])
	case "health":
		return health(ctx, args[1])
	case "get":
		return get(ctx, args[1], args[2])
	case "try":
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return get(ctx, args[1], "")
	case "greet":
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
		c, err := d.DialContext(ctx, "tcp", args[1])
		if err == nil {
			err = c.Close()
		}
		return err
	case "load":
		return load(ctx, args[1])
	case "steady":
		n, err := strconv.Atoi(cmp.Or(args[3], "1"))
		if err == nil {
			steady(ctx, args[1], args[2], n)
		}
		return err
	case "lookup":
		addrs, err := net.DefaultResolver.LookupHost(ctx, args[1])
		slices.Sort(addrs)
		fmt.Println(strings.Join(addrs, " "))
		return err
	case "cat":
		text, err := os.ReadFile(args[1])
		fmt.Print(string(text))
		return err
	case "escape":
		return escape(args[1])
	case "sleep":
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("%q is nothing that it can do", args[0])
}

// escape sends a segment that says it belongs to a connection, past everything that leads connections.
func escape(address string) error {
	conn, err := net.Dial("ip4:tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	const ack = 0x10
	_, err = conn.Write(append([]byte{0x30, 0x39, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, ack, 0xff, 0xff, 0, 0, 0, 0}, "over the wall"...))
	return err
}

// serve answers with its host's name, the client's address and the path, and logs it. At
// its end it finishes what it was asked.
func serve(ctx context.Context, address, raw string) error {
	if address == "" {
		address = ":8080"
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	server := &http.Server{Addr: address, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Printf("%s asks for %s\n", client, r.URL.Path)
		fmt.Fprintf(w, "host=%s client=%s path=%s\n", host, client, r.URL.Path)
		if seconds, slow := strings.CutPrefix(r.URL.Path, "/slow/"); slow {
			drip(w, seconds)
		}
	})}
	if raw != "" {
		l, err := net.Listen("tcp", raw)
		if err != nil {
			return err
		}
		go repeat(l, host)
	}
	ended := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(ended)
		ctx, cancel := context.WithTimeout(context.Background(), shutdownWithin)
		defer cancel()
		server.Shutdown(ctx)
	})
	fmt.Printf("%s serves on %s\n", host, address)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-ended // with the last answer
	return nil
}

// shutdownWithin is how long open requests are answered after the signal to end.
const shutdownWithin = 55 * time.Second

// drip answers a line each second, and then that it is all.
func drip(w http.ResponseWriter, seconds string) {
	n, _ := strconv.Atoi(seconds)
	for i := range n {
		time.Sleep(time.Second)
		fmt.Fprintf(w, "second %d\n", i+1)
		http.NewResponseController(w).Flush()
	}
	fmt.Fprintln(w, "that is all")
}

func health(ctx context.Context, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, grpchealth.NewServer())
	context.AfterFunc(ctx, server.Stop)
	return server.Serve(l)
}

// load asks every few milliseconds, in turn by a new connection and by one that is kept,
// says FAILED and why for each request that was not answered, and every second how many
// were.
func load(ctx context.Context, url string) error {
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	var same kept
	tick, second := time.NewTicker(5*time.Millisecond), time.NewTicker(time.Second)
	defer tick.Stop()
	defer second.Stop()
	answered := 0
	for turn := 0; ; turn++ {
		select {
		case <-ctx.Done():
			return nil
		case <-second.C:
			fmt.Printf("answered %d\n", answered)
		case <-tick.C:
		}
		var err error
		if turn%2 == 0 {
			err = same.ask(ctx, url)
		} else {
			err = ask(ctx, fresh, url)
		}
		if err != nil && ctx.Err() == nil {
			fmt.Printf("FAILED after %d: %v\n", answered, err)
			continue
		}
		answered++
	}
}

// kept is one connection for all requests. An http.Transport would open another one when it
// likes, as when it had to wait for a processor.
type kept struct {
	conn net.Conn
	in   *bufio.Reader
}

func (k *kept) ask(ctx context.Context, url string) (err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if k.conn == nil {
		d := net.Dialer{Timeout: patience}
		if k.conn, err = d.DialContext(ctx, "tcp", net.JoinHostPort(req.URL.Hostname(), cmp.Or(req.URL.Port(), "80"))); err != nil {
			k.conn = nil
			return err
		}
		k.in = bufio.NewReader(k.conn)
	}
	defer func() {
		if err != nil {
			k.conn.Close()
			k.conn, err = nil, fmt.Errorf("the connection that was kept: %w", err)
		}
	}()
	k.conn.SetDeadline(time.Now().Add(patience))
	if err := req.Write(k.conn); err != nil {
		return err
	}
	resp, err := http.ReadResponse(k.in, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	switch {
	case resp.StatusCode != http.StatusOK:
		return errors.New(resp.Status)
	case resp.Close:
		return errors.New("the server ends it")
	}
	return nil
}

func ask(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// get asks with a new connection each time, so that each is balanced.
func get(ctx context.Context, url, times string) error {
	n := 1
	if times != "" {
		var err error
		if n, err = strconv.Atoi(times); err != nil {
			return err
		}
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 50 * time.Second}
	for range n {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s: %s", url, resp.Status, text)
		}
		fmt.Print(string(text))
	}
	return nil
}
