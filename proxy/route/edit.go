package route

import (
	"slices"
	"strings"

	"assay.dev"
)

// Edits is what changes of a request and of its response.
type Edits struct {
	Request  HeadEdit
	Response HeadEdit
	Host     string // replaces the authority; "" does not
	Path     *assay.PathEdit
	Mirrors  []Mirror
}

// HeadEdit changes the fields of a head: those in Drop go, then those in Append come.
type HeadEdit struct {
	Drop   []string // in lower case
	Append []assay.HeaderField
}

// IsZero reports whether nothing changes.
func (e *HeadEdit) IsZero() bool { return len(e.Drop)+len(e.Append) == 0 }

// Drops reports whether a field goes.
func (e *HeadEdit) Drops(name []byte) bool {
	for _, d := range e.Drop {
		if len(d) == len(name) && equalFold(name, d) {
			return true
		}
	}
	return false
}

// equalFold compares a name with one in lower case.
func equalFold(b []byte, lower string) bool {
	for i := range b {
		c := b[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// Mirror is where a copy of a share of the requests goes.
type Mirror struct {
	Service                string
	Port                   uint16
	Numerator, Denominator uint32
}

// Takes reports whether the copy is made, for a random number.
func (m *Mirror) Takes(random uint64) bool { return random%uint64(m.Denominator) < uint64(m.Numerator) }

// newEdits merges edits that follow each other; nil when nothing changes.
func newEdits(list ...*assay.RouteEdits) *Edits {
	e := &Edits{}
	for _, in := range list {
		e.Request.then(&in.Request)
		e.Response.then(&in.Response)
		if in.Host != "" {
			e.Host = in.Host
		}
		if in.Path != nil {
			e.Path = in.Path
		}
		for _, m := range in.Mirrors {
			if m.Invalid == "" && m.Numerator > 0 && m.Denominator > 0 {
				e.Mirrors = append(e.Mirrors, Mirror{m.Service, m.Port, m.Numerator, m.Denominator})
			}
		}
	}
	if e.Request.IsZero() && e.Response.IsZero() && e.Host == "" && e.Path == nil && len(e.Mirrors) == 0 {
		return nil
	}
	return e
}

// then adds an edit that comes after e.
func (e *HeadEdit) then(in *assay.HeaderEdit) {
	drop := func(name string) {
		name = strings.ToLower(name)
		e.Append = slices.DeleteFunc(e.Append, func(f assay.HeaderField) bool { return strings.ToLower(f.Name) == name })
		if !slices.Contains(e.Drop, name) {
			e.Drop = append(e.Drop, name)
		}
	}
	for _, name := range in.Remove {
		drop(name)
	}
	for _, f := range in.Set {
		drop(f.Name)
		e.Append = append(e.Append, f)
	}
	e.Append = append(e.Append, in.Add...)
}

// AppendPath appends the path that the edit makes of path, to which the query is added as
// it was.
func AppendPath(dst []byte, e *assay.PathEdit, path []byte) []byte {
	if e == nil {
		return append(dst, path...)
	}
	if e.Full != "" {
		return append(dst, e.Full...)
	}
	// The prefix is whole elements; a '/' at either end of it does not count.
	rest := path
	if n := len(strings.TrimSuffix(e.Match, "/")); n <= len(path) {
		rest = path[n:]
	}
	with := strings.TrimSuffix(e.With, "/")
	if with == "" && len(rest) == 0 {
		return append(dst, '/')
	}
	if len(with) > 0 && with[0] != '/' {
		dst = append(dst, '/')
	}
	dst = append(dst, with...)
	if len(rest) > 0 && rest[0] != '/' {
		dst = append(dst, '/')
	}
	return append(dst, rest...)
}
