package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"assay.dev"
	"assay.dev/api"
)

// operator asks control what any operator may ask, over its unix socket.
type operator struct {
	conn *grpc.ClientConn
	api  api.OperatorClient
}

func dialOperator(socket string) (*operator, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &operator{conn, api.NewOperatorClient(conn)}, nil
}

func (o *operator) close() { o.conn.Close() }

// list reads all objects of a kind, of every namespace.
func list[T any](ctx context.Context, o *operator, kind string) ([]T, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := o.api.List(ctx, &api.ListRequest{Kind: kind})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", kind, err)
	}
	items := make([]T, len(resp.Items))
	for i, raw := range resp.Items {
		if err := json.Unmarshal(raw, &items[i]); err != nil {
			return nil, fmt.Errorf("list %s: %w", kind, err)
		}
	}
	return items, nil
}

// sample asks for everything that the view shows.
func (o *operator) sample(ctx context.Context) (s sample, err error) {
	s.at = time.Now()
	if s.workloads, err = list[assay.Workload](ctx, o, "workloads"); err != nil {
		return s, err
	}
	if s.edges, err = list[assay.Edge](ctx, o, "edges"); err != nil {
		return s, err
	}
	s.findings, err = list[assay.Finding](ctx, o, "findings")
	return s, err
}
