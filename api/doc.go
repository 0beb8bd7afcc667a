// Package api is the gRPC between agents and control and between operators and
// control, generated from assay.proto, with the conversions between its messages
// and the nouns of package assay. Reading a message from the wire validates it:
// what the conversions return is well-formed.
//
// views.go has the documents of Operator.List.
//
// Regenerate with `make generate`.
package api
