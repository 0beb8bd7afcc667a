//go:build race

package http1

// Under the race detector sync.Pool forgets at random.
func init() { pooled = false }
