package http1

import (
	"bytes"

	"assay.dev"
	"assay.dev/proxy/route"
)

// Head is a complete head as it came, to be looked into and to be written changed.
// Nothing is changed but what an edit names: every other byte stays as and where it is.
type Head struct{ b []byte }

// NewHead returns the head of a message that was parsed: b begins with it, and Size is
// its length.
func NewHead(b []byte, size int) Head { return Head{b[:size]} }

// next splits the first field line off rest; no line: the empty one is reached.
func nextField(rest []byte) (line, after []byte) {
	i := bytes.IndexByte(rest, '\n')
	if i < 2 {
		return nil, rest
	}
	return rest[:i+1], rest[i+1:]
}

// Each calls f with every field as it came, until f returns false.
func (h *Head) Each(f func(name, value []byte) bool) {
	_, rest := nextField(h.b)
	for {
		var line []byte
		if line, rest = nextField(rest); line == nil {
			return
		}
		n := bytes.IndexByte(line, ':')
		if n < 0 || !f(line[:n], trim(line[n+1:len(line)-2])) {
			return
		}
	}
}

// Field implements route.Fields.
func (h *Head) Field(name string, scratch []byte) (value []byte, ok bool) {
	_, rest := nextField(h.b)
	for {
		var line []byte
		if line, rest = nextField(rest); line == nil {
			return value, ok
		}
		if len(line) <= len(name) || line[len(name)] != ':' || !isField(line[:len(name)], name) {
			continue
		}
		v := trim(line[len(name)+1 : len(line)-2])
		if !ok {
			value, ok = v, true
			continue
		}
		if len(scratch) == 0 {
			scratch = append(scratch, value...)
		}
		scratch = append(append(scratch, ", "...), v...)
		value = scratch
	}
}

// isField is equalFold for any token: '_' among others is no letter.
func isField(b []byte, name string) bool {
	for i := range b {
		if lower(b[i]) != name[i] {
			return false
		}
	}
	return true
}

// AppendRequest appends the head with another target and host, where they are not nil,
// and its fields edited.
func (h *Head) AppendRequest(dst []byte, target, host []byte, edits ...*route.HeadEdit) []byte {
	line, rest := nextField(h.b)
	if target != nil {
		from := bytes.IndexByte(line, ' ') + 1
		to := from + bytes.IndexByte(line[from:], ' ')
		dst = append(append(append(dst, line[:from]...), target...), line[to:]...)
	} else {
		dst = append(dst, line...)
	}
	if host != nil {
		dst = append(append(append(dst, "Host: "...), host...), "\r\n"...)
	}
	return appendFields(dst, rest, host != nil, edits)
}

// AppendResponse appends the head with its fields edited.
func (h *Head) AppendResponse(dst []byte, edits ...*route.HeadEdit) []byte {
	line, rest := nextField(h.b)
	return appendFields(append(dst, line...), rest, false, edits)
}

func appendFields(dst, rest []byte, withoutHost bool, edits []*route.HeadEdit) []byte {
	for {
		line, after := nextField(rest)
		if line == nil {
			break
		}
		rest = after
		name := line[:bytes.IndexByte(line, ':')]
		drop := withoutHost && equalFold(name, "host")
		for _, e := range edits {
			drop = drop || e != nil && e.Drops(name)
		}
		if !drop {
			dst = append(dst, line...)
		}
	}
	for _, e := range edits {
		if e == nil {
			continue
		}
		for i := range e.Append {
			f := &e.Append[i]
			dst = append(append(append(append(dst, f.Name...), ": "...), f.Value...), "\r\n"...)
		}
	}
	return append(dst, rest...) // the empty line
}

// Path returns the path and the query of the target. A request without a path (CONNECT,
// OPTIONS *) has none; that of an absolute target may be empty, which means "/".
func (r *Request) Path() (path, query []byte) {
	path = r.Target[r.pathAt():]
	if i := bytes.IndexByte(path, '?'); i >= 0 {
		path, query = path[:i], path[i+1:]
	}
	return path, query
}

// pathAt is where the path begins in the target.
func (r *Request) pathAt() int {
	t := r.Target
	switch {
	case t[0] == '/':
		return 0
	case r.IsConnect || t[0] == '*':
		return len(t)
	}
	at := bytes.Index(t, []byte("://")) + 3
	if end := bytes.IndexAny(t[at:], "/?"); end >= 0 {
		return at + end
	}
	return len(t)
}

// AppendTarget appends the target with another host, where that is not nil, and its path
// edited. The query stays.
func (r *Request) AppendTarget(dst, host []byte, edit *assay.PathEdit) []byte {
	t, at := r.Target, r.pathAt()
	if r.IsConnect || t[0] == '*' {
		return append(dst, t...)
	}
	if at > 0 && host != nil {
		scheme := bytes.Index(t, []byte("://")) + 3
		dst = append(append(dst, t[:scheme]...), host...)
	} else {
		dst = append(dst, t[:at]...)
	}
	path, _ := r.Path()
	if len(path) == 0 {
		path = []byte("/")
	}
	dst = route.AppendPath(dst, edit, path)
	if i := bytes.IndexByte(t[at:], '?'); i >= 0 {
		dst = append(dst, t[at+i:]...)
	}
	return dst
}
