package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// maxBody bounds the JSON that the bank's services read.
const maxBody = 64 << 10

// newClient returns an ordinary HTTP client: pooled keep-alive connections, no TLS,
// nothing that knows of a mesh.
func newClient() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	t.MaxIdleConnsPerHost = 32
	return &http.Client{Transport: t, Timeout: 10 * time.Second}
}

// statusError is an HTTP answer that is not a success, or one that we want to give.
type statusError struct {
	Code int
	Text string
}

func (e *statusError) Error() string { return e.Text }

func refuse(code int, format string, args ...any) error {
	return &statusError{code, fmt.Sprintf(format, args...)}
}

// call sends in as JSON (nothing when nil) and reads the answer into out.
func call(ctx context.Context, c *http.Client, method, url string, in, out any) error {
	resp, err := send(ctx, c, method, url, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("%s %s: answer: %w", method, url, err)
	}
	// Reading to the end gives the connection back to the pool.
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// send is call for answers that are read as a stream: the caller closes the body.
func send(ctx context.Context, c *http.Client, method, url string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var problem struct {
		Error string `json:"error"`
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if json.Unmarshal(b, &problem) != nil || problem.Error == "" {
		problem.Error = fmt.Sprintf("%s %s: %s", method, url, resp.Status)
	}
	return nil, &statusError{resp.StatusCode, problem.Error}
}

// handle turns a function that returns an error into a handler. What is not a
// statusError is an upstream's failure: 502.
func handle(log *slog.Logger, f func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := f(w, r)
		if err == nil {
			return
		}
		code := http.StatusBadGateway
		if e, ok := errors.AsType[*statusError](err); ok {
			code = e.Code
		}
		if code >= 500 && r.Context().Err() == nil {
			log.Error("request", "method", r.Method, "path", r.URL.Path, "err", err)
		}
		writeJSON(w, code, map[string]string{"error": err.Error()})
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v) // an error here is the client's going away
}

// readJSON reads a request's body strictly.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return refuse(http.StatusBadRequest, "body: %v", err)
	}
	return nil
}

// serveHTTP serves until ctx ends, then gives requests in flight five seconds.
func serveHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := srv.Shutdown(grace)
	if err != nil {
		srv.Close()
	}
	<-done
	return err
}
