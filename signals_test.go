package assay

import (
	"reflect"
	"testing"
	"time"
)

// A count that a sum leaves out is lost with the first upgrade of a proxy.
func TestSumsLeaveNothingOut(t *testing.T) {
	one := func() Signals {
		var s Signals
		count(t, reflect.ValueOf(&s).Elem())
		s.SignalKey = SignalKey{Service: "bank/payments"}
		s.FirstSeen, s.LastSeen = time.Unix(10, 0), time.Unix(20, 0)
		return s
	}
	sum, other := one(), one()
	other.FirstSeen, other.LastSeen = time.Unix(5, 0), time.Unix(30, 0)
	sum.Add(&other)
	if !sum.FirstSeen.Equal(time.Unix(5, 0)) || !sum.LastSeen.Equal(time.Unix(30, 0)) {
		t.Errorf("seen from %s to %s", sum.FirstSeen, sum.LastSeen)
	}
	doubled(t, "Signals", reflect.ValueOf(sum))

	var c Counters
	count(t, reflect.ValueOf(&c).Elem())
	c.Decisions, c.Unfit = []Decided{{Service: "bank/payments", Decision: "retry", Count: 1}}, nil
	doubled(t, "Counters", reflect.ValueOf(c.Plus(&c)))
	if c.Handshakes != 1 || c.Refusals["x"] != 1 {
		t.Errorf("adding has changed a part: %+v", c)
	}
}

// count sets every count to 1.
func count(t *testing.T, v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				count(t, v.Field(i))
			}
		}
	case reflect.Uint64:
		v.SetUint(1)
	case reflect.Int64:
		v.SetInt(1)
	case reflect.Array:
		for i := range v.Len() {
			count(t, v.Index(i))
		}
	case reflect.Map:
		m := reflect.MakeMap(v.Type())
		m.SetMapIndex(reflect.ValueOf("x"), reflect.ValueOf(uint64(1)))
		v.Set(m)
	}
}

// doubled wants every count to be 2.
func doubled(t *testing.T, name string, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() || v.Type() == reflect.TypeFor[SignalKey]() {
			return
		}
		for i := range v.NumField() {
			doubled(t, name+"."+v.Type().Field(i).Name, v.Field(i))
		}
	case reflect.Uint64:
		if v.Uint() != 2 {
			t.Errorf("%s is %d, want 2", name, v.Uint())
		}
	case reflect.Int64:
		if v.Int() != 2 {
			t.Errorf("%s is %d, want 2", name, v.Int())
		}
	case reflect.Array, reflect.Slice:
		for i := range v.Len() {
			doubled(t, name, v.Index(i))
		}
	case reflect.Map:
		if n := v.MapIndex(reflect.ValueOf("x")); !n.IsValid() || n.Uint() != 2 {
			t.Errorf("%s is %v", name, v)
		}
	}
}
