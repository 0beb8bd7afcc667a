package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"google.golang.org/grpc"
)

// The application behind each contender, beside nginx: bytes that come back, and gRPC.
// It is this very program, started as `bench serve NGINX…`, so that one process is the
// parent of all and everything ends with it.

// payload is what a message is made of, in both directions.
const payload = smallBody

// serve is the application's life.
func serve(nginx []string) error {
	cmd := exec.Command(nginx[0], nginx[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	echo, err := net.Listen("tcp", fmt.Sprint(":", portEcho))
	calls, err2 := net.Listen("tcp", fmt.Sprint(":", portGRPC))
	if err := errors.Join(err, err2, cmd.Start()); err != nil {
		return err
	}
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { serveEcho(echo) })
	s := grpc.NewServer(grpc.ForceServerCodec(raw{}), grpc.MaxConcurrentStreams(4096))
	s.RegisterService(&service, nil)
	running.Go(func() { s.Serve(calls) })
	err = cmd.Wait()
	echo.Close()
	s.Stop()
	return err
}

// last is the first byte of a message after which the application closes the connection.
const last = 1

// serveEcho sends everything back that comes.
func serveEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			// Not io.Copy, which would splice: an application looks at its bytes.
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				if _, err := c.Write(buf[:n]); err != nil || buf[0] == last {
					return
				}
			}
		}()
	}
}

// raw is a codec for messages that are bytes.
type raw struct{}

func (raw) Name() string { return "raw" }

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (raw) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append((*v.(*[]byte))[:0], data...)
	return nil
}

// The methods: a call, messages both ways in turn, and messages as fast as they go until
// the client has enough.
const (
	methodUnary = "/bench.Echo/Unary"
	methodTalk  = "/bench.Echo/Talk"
	methodWatch = "/bench.Echo/Watch"
)

var service = grpc.ServiceDesc{
	ServiceName: "bench.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var m []byte
		err := dec(&m)
		return &m, err
	}}},
	Streams: []grpc.StreamDesc{
		{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			for m := []byte(nil); ; {
				if err := s.RecvMsg(&m); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				if err := s.SendMsg(&m); err != nil {
					return err
				}
			}
		}},
		{StreamName: "Watch", ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			for m := []byte(nil); ; {
				if m == nil {
					if err := s.RecvMsg(&m); err != nil {
						return err
					}
				}
				if err := s.SendMsg(&m); err != nil {
					return err
				}
			}
		}},
	},
}
