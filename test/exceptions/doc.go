// Package exceptions looks at what passes beside the proxies of a real mesh: UDP and
// other transports, excluded ports, raw sockets and frames. Each is listed with who
// and why, and the bytes on every link have their place.
package exceptions
