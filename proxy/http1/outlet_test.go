package http1

import (
	"io"
	"net"
	"testing"
	"time"
)

// TestHold: what is held back leaves with the shutdown, or by push.
func TestHold(t *testing.T) {
	for name, then := range map[string]func(*outlet){
		"shutdown": func(o *outlet) { o.shutdown(); o.push() },
		"push":     func(o *outlet) { o.push(); o.write([]byte(" more")); o.shutdown() },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			far, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			tcp := c.(*net.TCPConn)
			raw, err := tcp.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var o outlet
			o.init(func(int) {}, 0)
			o.open(tcp, raw)
			o.hold()
			if n, err := o.write([]byte("last")); n != 4 || err != nil {
				t.Fatalf("wrote %d, %v", n, err)
			}
			then(&o)
			far.SetReadDeadline(time.Now().Add(20 * time.Second))
			got, err := io.ReadAll(far)
			if want := map[string]string{"shutdown": "last", "push": "last more"}[name]; string(got) != want || err != nil {
				t.Errorf("%q, %v, want %q and the end", got, err, want)
			}
		})
	}
}
