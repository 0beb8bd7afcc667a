// Package conformance runs the conformance suite of Gateway API, profiles MESH-HTTP and
// MESH-GRPC, against a real cluster that Assay was installed into, and writes the report.
//
// Suite and echo server are others' programs, each compiled from a module of its own
// (suite/, echo/): what they need, nothing here needs. The echo server is the one that the
// suite's manifests name, in an image that is made here under the name that they give.
//
// It refuses to run without root and without being asked: `make conformance`.
package conformance
