// Package demo tests `assay demo` as a user runs it: that its check passes, that it
// fails when the data plane is sabotaged, that it ends and leaves nothing behind.
package demo
