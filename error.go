package assay

import "errors"

// Kind sorts errors by what the reader can do about them. Kinds cross the wire;
// the list is append-only.
type Kind uint8

const (
	Internal    Kind = iota // a bug or a broken machine
	Invalid                 // the request or the file is wrong: change it
	Denied                  // a rule or a missing privilege: ask for it
	NotFound                // there is no such thing
	Conflict                // it exists already, or somebody else holds it
	Unavailable             // not now: try again
)

func (k Kind) String() string {
	switch k {
	case Invalid:
		return "invalid"
	case Denied:
		return "denied"
	case NotFound:
		return "not found"
	case Conflict:
		return "conflict"
	case Unavailable:
		return "unavailable"
	}
	return "internal"
}

// Error is an error for the person who reads it: the operation with its subject,
// the cause, and what would fix it.
type Error struct {
	Kind   Kind
	Op     string // "run payments", "open store /var/lib/assay/state.db"
	Err    error  // the cause
	Remedy string // what to do; "" when the cause says it
}

func (e *Error) Error() string {
	s := e.Op
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Remedy != "" {
		s += " (" + e.Remedy + ")"
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the first Error in err's chain, Internal otherwise.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}
