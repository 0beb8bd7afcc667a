package route

import (
	"slices"
	"strconv"
	"strings"

	"assay.dev"
)

// CORS is who may use responses from pages of other origins.
type CORS struct {
	origins     []string
	any         bool
	credentials bool
	methods     string
	headers     string
	expose      string
	maxAge      string
}

// corsFields are those of a response that a rule with CORS decides about alone.
var corsFields = []string{
	"access-control-allow-origin", "access-control-allow-credentials", "access-control-expose-headers",
	"access-control-allow-methods", "access-control-allow-headers", "access-control-max-age",
}

func newCORS(in *assay.CORS) *CORS {
	if in == nil {
		return nil
	}
	c := &CORS{
		credentials: in.Credentials, methods: strings.Join(in.Methods, ", "), headers: strings.Join(in.Headers, ", "),
		expose: strings.Join(in.ExposeHeaders, ", "), maxAge: strconv.Itoa(int(max(in.MaxAge, 1))), any: slices.Contains(in.Origins, "*"),
	}
	for _, o := range in.Origins {
		// A port that the scheme has anyway is not in what a browser sends.
		if rest, ok := strings.CutSuffix(o, ":80"); ok && strings.HasPrefix(o, "http://") {
			o = rest
		} else if rest, ok := strings.CutSuffix(o, ":443"); ok && strings.HasPrefix(o, "https://") {
			o = rest
		}
		c.origins = append(c.origins, strings.ToLower(o))
	}
	return c
}

// allowed returns what to answer to an origin; "" is nothing.
func (c *CORS) allowed(origin string) string {
	if c.any {
		if c.credentials {
			return origin
		}
		return "*"
	}
	lower := strings.ToLower(origin)
	for _, o := range c.origins {
		if glob(o, lower) {
			return origin
		}
	}
	return ""
}

// glob reports whether s is pattern, in which '*' stands for any text without ':' and '/'.
func glob(pattern, s string) bool {
	star := strings.IndexByte(pattern, '*')
	if star < 0 {
		return pattern == s
	}
	if !strings.HasPrefix(s, pattern[:star]) {
		return false
	}
	s, pattern = s[star:], pattern[star+1:]
	for {
		if glob(pattern, s) {
			return true
		}
		if s == "" || s[0] == ':' || s[0] == '/' {
			return false
		}
		s = s[1:]
	}
}

// Preflight returns the fields of the answer (204) to a browser that asks for leave, and
// ok false when the request is something else.
func (c *CORS) Preflight(v *View) (fields []assay.HeaderField, ok bool) {
	if string(v.Method) != "OPTIONS" {
		return nil, false
	}
	asked, ok := v.field("access-control-request-method")
	if !ok {
		return nil, false
	}
	method := string(asked)
	value, ok := v.field("origin")
	if !ok {
		return nil, false
	}
	origin := c.allowed(string(value))
	fields = append(fields, assay.HeaderField{Name: "Vary", Value: "Origin"})
	if origin == "" {
		return fields, true
	}
	fields = c.common(fields, origin)
	if m := c.methods; m != "" {
		if m == "*" && c.credentials {
			m = method
		}
		fields = append(fields, assay.HeaderField{Name: "Access-Control-Allow-Methods", Value: m})
	}
	if h := c.headers; h != "" {
		if h == "*" && c.credentials {
			asked, _ := v.field("access-control-request-headers")
			h = string(asked)
		}
		if h != "" {
			fields = append(fields, assay.HeaderField{Name: "Access-Control-Allow-Headers", Value: h})
		}
	}
	return append(fields, assay.HeaderField{Name: "Access-Control-Max-Age", Value: c.maxAge}), true
}

// Response returns what changes of the response to a request from a page; nil when it
// comes from none.
func (c *CORS) Response(v *View) *HeadEdit {
	value, ok := v.field("origin")
	if !ok {
		return nil
	}
	e := &HeadEdit{Drop: corsFields, Append: []assay.HeaderField{{Name: "Vary", Value: "Origin"}}}
	if origin := c.allowed(string(value)); origin != "" {
		e.Append = c.common(e.Append, origin)
		if c.expose != "" && !(c.expose == "*" && c.credentials) {
			e.Append = append(e.Append, assay.HeaderField{Name: "Access-Control-Expose-Headers", Value: c.expose})
		}
	}
	return e
}

func (c *CORS) common(fields []assay.HeaderField, origin string) []assay.HeaderField {
	fields = append(fields, assay.HeaderField{Name: "Access-Control-Allow-Origin", Value: origin})
	if c.credentials {
		fields = append(fields, assay.HeaderField{Name: "Access-Control-Allow-Credentials", Value: "true"})
	}
	return fields
}
