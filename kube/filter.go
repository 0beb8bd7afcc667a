package kube

import (
	"fmt"
	"slices"
	"strings"

	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/discovery"
)

// filters reads the filters of a rule or of a backend into rule.
func (r *routeReader) filters(path string, list []gateway.HTTPRouteFilter, rule *assay.RouteRule) {
	if len(list) > 16 {
		r.at(path+".filters", "%d filters; 16 are supported", len(list))
		return
	}
	seen := map[gateway.HTTPRouteFilterType]bool{}
	for i := range list {
		f := &list[i]
		at := fmt.Sprintf("%s.filters[%d]", path, i)
		if !r.filterForm(at, f) {
			continue
		}
		if seen[f.Type] && f.Type != gateway.HTTPRouteFilterRequestMirror && f.Type != gateway.HTTPRouteFilterExtensionRef {
			r.reject(discovery.ReasonIncompatibleFilters, "%s is there twice", f.Type)
		}
		seen[f.Type] = true
		switch f.Type {
		case gateway.HTTPRouteFilterRequestHeaderModifier:
			rule.Request = r.headerEdit(at+".requestHeaderModifier", f.RequestHeaderModifier, &rule.Host)
		case gateway.HTTPRouteFilterResponseHeaderModifier:
			rule.Response = r.headerEdit(at+".responseHeaderModifier", f.ResponseHeaderModifier, nil)
		case gateway.HTTPRouteFilterRequestRedirect:
			rule.Redirect = r.redirect(f.RequestRedirect, rule.Matches)
		case gateway.HTTPRouteFilterURLRewrite:
			if h := value(f.URLRewrite.Hostname); h != "" {
				rule.Host = r.hostname("urlRewrite.hostname", h)
			}
			rule.Path = r.pathEdit("urlRewrite.path", f.URLRewrite.Path, rule.Matches)
		case gateway.HTTPRouteFilterRequestMirror:
			r.mirror(at+".requestMirror", f.RequestMirror, rule)
		case gateway.HTTPRouteFilterCORS:
			rule.CORS = r.cors(at+".cors", f.CORS)
		case gateway.HTTPRouteFilterExtensionRef:
			e := f.ExtensionRef
			rule.Refuse = r.unresolved(discovery.ReasonInvalidKind, "filter ExtensionRef: %s %s of group %q is not known; a filter may not be skipped, so requests are answered 500", e.Kind, e.Name, e.Group)
		case gateway.HTTPRouteFilterExternalAuth:
			rule.Refuse = r.unresolved(discovery.ReasonInvalidKind, "filter ExternalAuth is not supported; a filter may not be skipped, so requests are answered 500")
		default:
			r.unsupported("filter %s is not supported", f.Type)
		}
	}
	if seen[gateway.HTTPRouteFilterRequestRedirect] && seen[gateway.HTTPRouteFilterURLRewrite] {
		r.reject(discovery.ReasonIncompatibleFilters, "RequestRedirect and URLRewrite cannot be combined")
	}
}

// filterForm checks that a filter has what its type names, and nothing else.
func (r *routeReader) filterForm(at string, f *gateway.HTTPRouteFilter) bool {
	if f.Type == "" {
		r.missing(at+".type", "say which filter it is")
		return false
	}
	ok := true
	for _, part := range []struct {
		kind  gateway.HTTPRouteFilterType
		field string
		there bool
	}{
		{gateway.HTTPRouteFilterRequestHeaderModifier, "requestHeaderModifier", f.RequestHeaderModifier != nil},
		{gateway.HTTPRouteFilterResponseHeaderModifier, "responseHeaderModifier", f.ResponseHeaderModifier != nil},
		{gateway.HTTPRouteFilterRequestMirror, "requestMirror", f.RequestMirror != nil},
		{gateway.HTTPRouteFilterRequestRedirect, "requestRedirect", f.RequestRedirect != nil},
		{gateway.HTTPRouteFilterURLRewrite, "urlRewrite", f.URLRewrite != nil},
		{gateway.HTTPRouteFilterCORS, "cors", f.CORS != nil},
		{gateway.HTTPRouteFilterExternalAuth, "externalAuth", f.ExternalAuth != nil},
		{gateway.HTTPRouteFilterExtensionRef, "extensionRef", f.ExtensionRef != nil},
	} {
		switch {
		case part.kind == f.Type && !part.there:
			r.missing(at+"."+part.field, fmt.Sprintf("is needed for type %s", f.Type))
			ok = false
		case part.kind != f.Type && part.there:
			r.at(at+"."+part.field, "is not of a filter of type %s", f.Type)
			ok = false
		}
	}
	return ok
}

// headerEdit reads a header modifier. To set Host, where host is not nil, is to
// rewrite the authority.
func (r *routeReader) headerEdit(at string, in *gateway.HTTPHeaderFilter, host *string) assay.HeaderEdit {
	var out assay.HeaderEdit
	// Optional white space around a value belongs to no field.
	text := func(name gateway.HTTPHeaderName, v string) string {
		if strings.ContainsAny(v, "\r\n\x00") {
			r.unsupported("header %s: %q would not be the value of one field to whoever reads it", name, v)
		}
		return strings.Trim(v, " \t")
	}
	check := func(path, name string) bool {
		if !assay.ValidToken(name) {
			r.at(path, "%q cannot be the name of a header", name)
			return false
		}
		if assay.FramingField(name) {
			r.unsupported("header %s says how the message is framed or its connection used; no filter may change it", name)
			return false
		}
		return true
	}
	for i, list := range [][]gateway.HTTPHeader{in.Set, in.Add} {
		field := [...]string{".set", ".add"}[i]
		for j, f := range list {
			if i == 0 && host != nil && strings.EqualFold(string(f.Name), "host") {
				*host = r.hostname("host", gateway.PreciseHostname(f.Value))
				continue
			}
			if !check(fmt.Sprintf("%s%s[%d].name", at, field, j), string(f.Name)) {
				continue
			}
			if i == 0 {
				out.Set = append(out.Set, assay.HeaderField{Name: string(f.Name), Value: text(f.Name, f.Value)})
			} else {
				out.Add = append(out.Add, assay.HeaderField{Name: string(f.Name), Value: text(f.Name, f.Value)})
			}
		}
	}
	for j, name := range in.Remove {
		if check(fmt.Sprintf("%s.remove[%d]", at, j), name) {
			out.Remove = append(out.Remove, strings.ToLower(name))
		}
	}
	return out
}

func (r *routeReader) hostname(field string, h gateway.PreciseHostname) string {
	name, port, hasPort := strings.Cut(string(h), ":")
	if !assay.ValidRouteName(name) || hasPort && port == "" {
		r.unsupported("%s: %q is not a host name", field, h)
	}
	return string(h)
}

func (r *routeReader) redirect(in *gateway.HTTPRequestRedirectFilter, matches []assay.RouteMatch) *assay.Redirect {
	out := &assay.Redirect{Scheme: value(in.Scheme), Status: 302, Port: uint16(value(in.Port))}
	if out.Scheme != "" && out.Scheme != "http" && out.Scheme != "https" {
		r.unsupported("requestRedirect.scheme %q is neither http nor https", out.Scheme)
	}
	if in.Hostname != nil {
		if out.Host = r.hostname("requestRedirect.hostname", *in.Hostname); strings.Contains(out.Host, ":") {
			r.unsupported("requestRedirect.hostname %q: its port has a field of its own", out.Host)
		}
	}
	if in.Port != nil && !validPort(*in.Port) {
		r.unsupported("requestRedirect.port: want 1 to 65535")
	}
	if in.StatusCode != nil {
		out.Status = *in.StatusCode
		if !slices.Contains([]int{301, 302, 303, 307, 308}, out.Status) {
			r.unsupported("requestRedirect.statusCode %d is none of 301, 302, 303, 307, 308", out.Status)
		}
	}
	out.Path = r.pathEdit("requestRedirect.path", in.Path, matches)
	return out
}

func (r *routeReader) pathEdit(field string, in *gateway.HTTPPathModifier, matches []assay.RouteMatch) *assay.PathEdit {
	if in == nil {
		return nil
	}
	switch in.Type {
	case gateway.FullPathHTTPPathModifier:
		full := value(in.ReplaceFullPath)
		if in.ReplaceFullPath == nil || in.ReplacePrefixMatch != nil || !strings.HasPrefix(full, "/") {
			r.unsupported("%s: ReplaceFullPath needs replaceFullPath, which begins with '/', and nothing else", field)
		}
		return &assay.PathEdit{Full: full}
	case gateway.PrefixMatchHTTPPathModifier:
		if in.ReplacePrefixMatch == nil || in.ReplaceFullPath != nil {
			r.unsupported("%s: ReplacePrefixMatch needs replacePrefixMatch, and nothing else", field)
		}
		if len(matches) != 1 || matches[0].Path.Type != assay.PathPrefix {
			r.unsupported("%s: ReplacePrefixMatch needs exactly one match in its rule, of type PathPrefix", field)
			return nil
		}
		return &assay.PathEdit{Match: matches[0].Path.Value, With: value(in.ReplacePrefixMatch)}
	}
	r.unsupported("%s.type %q is neither ReplaceFullPath nor ReplacePrefixMatch", field, in.Type)
	return nil
}

func (r *routeReader) mirror(at string, in *gateway.HTTPRequestMirrorFilter, rule *assay.RouteRule) {
	out := assay.RouteMirror{Numerator: 1, Denominator: 1}
	switch {
	case in.Percent != nil && in.Fraction != nil:
		r.at(at, "has percent and fraction; want one of them")
	case in.Percent != nil:
		if *in.Percent < 0 || *in.Percent > 100 {
			r.at(at+".percent", "want 0 to 100")
			return
		}
		out.Numerator, out.Denominator = uint32(*in.Percent), 100
	case in.Fraction != nil:
		n, d := in.Fraction.Numerator, int32(100)
		if in.Fraction.Denominator != nil {
			d = *in.Fraction.Denominator
		}
		if n < 0 || d < 1 || n > d {
			r.at(at+".fraction", "want a numerator from 0 to the denominator")
			return
		}
		out.Numerator, out.Denominator = uint32(n), uint32(d)
	}
	out.Service, out.Port, out.Invalid = r.reference(at+".backendRef", &in.BackendRef)
	rule.Mirrors = append(rule.Mirrors, out)
}

func (r *routeReader) cors(at string, in *gateway.HTTPCORSFilter) *assay.CORS {
	out := &assay.CORS{Credentials: value(in.AllowCredentials), MaxAge: in.MaxAge}
	if out.MaxAge == 0 {
		out.MaxAge = 5
	}
	if in.MaxAge < 0 {
		r.at(at+".maxAge", "want a number over 0")
	}
	for _, o := range in.AllowOrigins {
		scheme, host, ok := strings.Cut(string(o), "://")
		if o != "*" && (!ok || scheme != "http" && scheme != "https" || host == "" || strings.ContainsAny(host, "/ ,")) {
			r.unsupported("cors.allowOrigins: %q is neither '*' nor SCHEME://HOST[:PORT]", o)
		}
		out.Origins = append(out.Origins, string(o))
	}
	for _, m := range in.AllowMethods {
		out.Methods = append(out.Methods, string(m))
		if !assay.ValidToken(string(m)) {
			r.unsupported("cors.allowMethods: %q is not a method", m)
		}
	}
	names := func(field string, list []gateway.HTTPHeaderName) (out []string) {
		for _, n := range list {
			out = append(out, string(n))
			if !assay.ValidToken(string(n)) {
				r.unsupported("cors.%s: %q is not a header", field, n)
			}
		}
		return out
	}
	out.Headers, out.ExposeHeaders = names("allowHeaders", in.AllowHeaders), names("exposeHeaders", in.ExposeHeaders)
	for i, list := range [][]string{out.Origins, out.Methods, out.Headers} {
		if len(list) > 1 && slices.Contains(list, "*") {
			r.unsupported("cors.%s: '*' stands for all, so it stands alone", [...]string{"allowOrigins", "allowMethods", "allowHeaders"}[i])
		}
	}
	return out
}
