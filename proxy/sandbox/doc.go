// Package sandbox takes from the process, for good and for all its threads, what a
// proxy never needs of the kernel. It is entered before the first message is read.
//
//   - no_new_privs; of capabilities only CAP_NET_RAW stays (for IP_TRANSPARENT).
//   - Landlock: no file can be opened, made, changed or executed.
//   - seccomp: an allow-list of system calls; everything else fails with EPERM.
//     Sockets are TCP and UDP over IP, and unix sockets for the link: no raw and no
//     packet sockets, whatever CAP_NET_RAW would permit. No memory becomes
//     executable, no process is made, no other process gets a signal.
//
// A failing call returns an error instead of killing the process, so that a library
// that tries something new degrades and can be seen to.
//
// It refuses to run half done: what this kernel could do and did not is an error.
// What may be missing is returned as a note: Landlock on a kernel without it, and the
// first two in a program linked with cgo, which has threads that Go does not know of.
// The filter, which also denies all that Landlock does, is never missing.
//
// The allow-list was found by running the proxy's tests under it; filter.go says what
// each group is for. A process that was let in stays in: nothing here can be
// undone, and no goroutine is started.
package sandbox
