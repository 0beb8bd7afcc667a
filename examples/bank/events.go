package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// newEvents returns a NATS server that is not yet started. NATS speaks first: the
// server sends INFO as soon as a client connects.
func newEvents(listen string) (*server.Server, error) {
	host, p, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port %q: %w", p, err)
	}
	opts := &server.Options{ServerName: "events", Host: host, Port: int(port), NoSigs: true}
	if host == "" {
		opts.Host = "0.0.0.0"
	}
	if port == 0 {
		opts.Port = server.RANDOM_PORT
	}
	return server.NewServer(opts)
}

// runEvents serves until ctx ends.
func runEvents(ctx context.Context, s *server.Server) error {
	s.Start()
	defer s.WaitForShutdown()
	defer s.Shutdown()
	if !s.ReadyForConnections(10 * time.Second) {
		return fmt.Errorf("events: %s does not accept connections", s.Addr())
	}
	<-ctx.Done()
	return nil
}

// connectEvents connects an ordinary NATS client. It returns at once and connects
// as soon as the server is there; after a lost connection it connects again.
func connectEvents(url, name string, log *slog.Logger) (*nats.Conn, error) {
	nc, err := nats.Connect(url,
		nats.Name(name),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(200*time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 0),
		nats.ConnectHandler(func(*nats.Conn) { log.Info("events connected", "url", url) }),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("events connected again", "url", url) }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("events lost", "url", url, "err", err)
			}
		}))
	if err != nil {
		return nil, fmt.Errorf("events %s: %w", url, err)
	}
	return nc, nil
}

// publish announces an entry. While the server is away nats.go keeps messages in a
// bounded buffer; when that is full the announcement is lost and logged.
func publish(nc *nats.Conn, subject string, e *Entry, log *slog.Logger) {
	b, err := json.Marshal(e)
	if err == nil {
		err = nc.Publish(subject, b)
	}
	if err != nil {
		log.Error("publish", "subject", subject, "key", e.Key, "err", err)
	}
}

// closeEvents sends what was published and closes.
func closeEvents(nc *nats.Conn) {
	if nc.IsConnected() {
		nc.FlushTimeout(time.Second) // an announcement that cannot be sent now is lost
	}
	nc.Close()
}
