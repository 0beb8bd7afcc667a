package proxy

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"assay.dev"
)

// TestRefusalLog: the first refusal of a kind and subject is a line at once, and those that
// follow are one for each minute, with their number.
func TestRefusalLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		drop := func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		}
		l := refusalLog{log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: drop}))}
		took := func(want ...string) {
			t.Helper()
			synctest.Wait()
			l.mu.Lock()
			defer l.mu.Unlock()
			var text strings.Builder
			for _, line := range want {
				text.WriteString(line + "\n")
			}
			if out.String() != text.String() {
				t.Errorf("%v: logged\n%swant\n%s", time.Now(), &out, &text)
			}
			out.Reset()
		}
		dst := netip.MustParseAddrPort("10.182.0.1:80")
		pay := refused{direction: assay.Outbound, destination: dst, service: "bank/pay", reason: refusedNoEndpoint}
		const line = "msg=refused direction=outbound destination=10.182.0.1:80 service=bank/pay reason=no-ready-endpoint error="
		l.add(pay, errors.New("1"))
		took(line + "1")
		for i := range 1000 {
			l.add(pay, fmt.Errorf("%d", i))
		}
		took()
		l.add(refused{message: "handshake", peer: "192.0.2.1", reason: "expired"}, nil)
		took("msg=handshake peer=192.0.2.1 reason=expired")
		time.Sleep(refusedEvery - time.Second)
		took()
		time.Sleep(time.Second)
		took(line + "999 times=1000")
		l.add(pay, errors.New("2"))
		time.Sleep(refusedEvery)
		took(line + "2")
		time.Sleep(refusedEvery) // it did not come again
		took()
		l.mu.Lock()
		if l.lines[pay] != nil {
			t.Error("who was refused once is remembered")
		}
		l.mu.Unlock()
		l.add(pay, errors.New("3"))
		took(line + "3")
		l.add(pay, errors.New("4"))
		l.add(pay, errors.New("5"))
		l.close()
		took(line + "5 times=2")

		// So many subjects are nobody's who tries for himself.
		for i := range 3 * maxRefused {
			l.add(refused{direction: assay.Inbound, source: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), destination: dst, reason: refusedStrict}, nil)
		}
		if n := strings.Count(out.String(), "\n"); n != maxRefused+1 || len(l.lines) != maxRefused+1 {
			t.Errorf("%d lines, %d subjects are remembered", n, len(l.lines))
		}
		out.Reset()
		l.close()
		took(fmt.Sprintf("msg=refused direction=inbound reason=plaintext-in-strict times=%d", 2*maxRefused-1))
	})
}

// TestRefusalLogAllocates: what is counted costs nothing.
func TestRefusalLogAllocates(t *testing.T) {
	l := refusalLog{log: slog.New(slog.DiscardHandler)}
	r := refused{direction: assay.Outbound, destination: netip.MustParseAddrPort("10.182.0.1:80"), service: "bank/pay", reason: refusedNoEndpoint}
	l.add(r, nil)
	defer l.close()
	if n := testing.AllocsPerRun(100, func() { l.add(r, nil) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
