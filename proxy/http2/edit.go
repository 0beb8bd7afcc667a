package http2

import (
	"slices"
	"strings"

	"assay.dev/proxy/route"
)

// View is the head as rules look at it.
func (h *Head) View() *route.View {
	path, query, _ := strings.Cut(h.Path, "?")
	return &route.View{Method: []byte(h.Method), Authority: []byte(h.Authority), Path: []byte(path), Query: []byte(query), Fields: fieldList(h.Fields)}
}

// fieldList implements route.Fields.
type fieldList []Field

func (l fieldList) Field(name string, scratch []byte) (value []byte, ok bool) {
	between := ", "
	if name == "cookie" {
		between = "; " // RFC 9113 section 8.2.3: clients send it in pieces
	}
	for i := range l {
		if l[i].Name == name {
			if ok {
				scratch = append(scratch, between...)
			}
			scratch, ok = append(scratch, l[i].Value...), true
		}
	}
	return scratch, ok
}

// Edited returns the request's fields as edits leave them; nil: as they are.
func (h *Head) Edited(e *route.Edits) []Field {
	host := e.Host
	if h.Method == "CONNECT" && h.Protocol == "" {
		host = "" // its authority is its target
	}
	if e.Path == nil && host == "" && e.Request.IsZero() {
		return nil
	}
	fields := Edit(slices.Clone(h.Fields), &e.Request)
	for i := range fields {
		switch f := &fields[i]; f.Name {
		case ":path":
			if path, query, has := strings.Cut(f.Value, "?"); e.Path != nil && strings.HasPrefix(path, "/") {
				f.Value = string(route.AppendPath(nil, e.Path, []byte(path)))
				if has {
					f.Value += "?" + query
				}
			}
		case ":authority", "host":
			if host != "" {
				f.Value = host
			}
		}
	}
	return fields
}

// edit is Edit for fields that were just decoded, of which it keeps in mind which are
// known: those that are added come again with the next request.
func (c *conn) edit(fields []Field, e *route.HeadEdit) []Field {
	kept := 0
	for i, f := range fields {
		if f.Name[0] == ':' || !e.Drops([]byte(f.Name)) {
			fields[kept], c.known[kept] = f, c.known[i]
			kept++
		}
	}
	fields, c.known = fields[:kept], c.known[:kept]
	for _, f := range e.Append {
		fields = append(fields, Field{Name: strings.ToLower(f.Name), Value: f.Value})
		c.known = append(c.known, true)
	}
	c.scratch = fields
	return fields
}

// Edit returns the fields as an edit leaves them.
func Edit(fields []Field, e *route.HeadEdit) []Field {
	if e == nil || e.IsZero() {
		return fields
	}
	out := make([]Field, 0, len(fields)+len(e.Append))
	for _, f := range fields {
		if !e.Drops([]byte(f.Name)) || strings.HasPrefix(f.Name, ":") {
			out = append(out, f)
		}
	}
	for _, f := range e.Append {
		out = append(out, Field{Name: strings.ToLower(f.Name), Value: f.Value})
	}
	return out
}
