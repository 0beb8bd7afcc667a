package guard

import (
	"math"
	"strconv"
	"time"
)

// GRPCTimeout is the name of the field in which a gRPC caller says how long it will
// wait: at most eight digits and a unit, "The gRPC over HTTP/2 protocol", Requests.
const GRPCTimeout = "grpc-timeout"

var grpcUnits = [...]struct {
	name byte
	size time.Duration
}{{'n', time.Nanosecond}, {'u', time.Microsecond}, {'m', time.Millisecond}, {'S', time.Second}, {'M', time.Minute}, {'H', time.Hour}}

// ParseGRPCTimeout reads the field's value. A value that is too large for a Duration
// is the largest one; one that is not of the field's form is none.
func ParseGRPCTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	n := time.Duration(0)
	for _, c := range []byte(s[:len(s)-1]) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + time.Duration(c-'0')
	}
	for _, u := range grpcUnits {
		if u.name == s[len(s)-1] {
			if n > math.MaxInt64/u.size {
				return math.MaxInt64, true
			}
			return n * u.size, true
		}
	}
	return 0, false
}

// AppendGRPCTimeout appends the value for d, in the finest unit that has room for it
// and rounded up: a deadline that comes a little late is harmless, one that comes
// early fails a call that would have been answered. What is over already is "0n".
func AppendGRPCTimeout(b []byte, d time.Duration) []byte {
	d = max(d, 0)
	for _, u := range grpcUnits {
		n := d / u.size
		if d%u.size > 0 {
			n++
		}
		if n < 100_000_000 {
			return append(strconv.AppendInt(b, int64(n), 10), u.name)
		}
	}
	return append(b, "99999999H"...)
}

// Remaining is what is left at now of a call that must be over at expires: the value
// to send on, since the time that was spent here is spent there, too. Without a
// deadline (0) it returns false. What is over is 0, and not worth sending.
func Remaining(expires, now time.Duration) (time.Duration, bool) {
	if expires == 0 {
		return 0, false
	}
	return max(expires-now, 0), true
}
