//go:build race

package http2

func init() { pooled = false }
