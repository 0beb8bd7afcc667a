package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"time"
)

// perIdle is what one connection costs both proxies together that asked once and then
// stays: the growth of their resident memory over n of them since they were idle
// themselves. What loads before it have left behind counts, too.
func (c *contender) perIdle(r *run, n int) float64 {
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	err := c.client.In(func() error {
		answer := make([]byte, 1<<10)
		for range n {
			conn, err := net.DialTimeout("tcp", c.addr, 5*time.Second)
			if err != nil {
				return err
			}
			conns = append(conns, conn)
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: bench\r\n\r\n"); err != nil {
				return err
			}
			got := 0
			for !bytes.HasSuffix(answer[:got], []byte(smallBody)) {
				k, err := conn.Read(answer[got:])
				if err != nil {
					return fmt.Errorf("answer %q: %w", answer[:got], err)
				}
				got += k
			}
		}
		return nil
	})
	if err != nil {
		r.Fatalf("%s: %d idle connections: %v", c.name, n, err)
	}
	after := readMemory(c.proxies())
	return float64(after.RSS-c.idle.RSS) / float64(n)
}
