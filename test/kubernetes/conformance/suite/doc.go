// Package suite is the conformance suite of Gateway API, as a test binary. It is a module
// of its own, so that what the suite needs is needed by nothing else.
package suite
