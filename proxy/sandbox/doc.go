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
// A refused call returns an error instead of killing the process, so that a library
// that tries something new degrades; the kernel's log names it (audit type 1326), where
// the kernel audits. A build with the tag assay_trap dies of it instead and shows the
// stack: the suites run so with `make trap`.
//
// It refuses to run half done: what this kernel could do and did not is an error.
// What may be missing is returned as a note: Landlock on a kernel without it, and the
// first two in a program linked with cgo, which has threads that Go does not know of.
// The filter, which also denies all that Landlock does, is never missing.
//
// The allow-list is what the executable can do, not what tests happened to do: a test
// takes the executable apart, for amd64 and arm64, and finds every system call in its
// code (calls.go; the few that come from elsewhere say from where). What is linked and
// not allowed is refused with a reason. docs/decisions/0013-system-calls.md has more.
//
// A process that was let in stays in: nothing here can be undone, and no goroutine is
// started.
//
// Tour: sandbox.go (Enter), calls.go (the list), filter.go (the program for the
// kernel), action.go and action_trap.go (what a refusal is).
package sandbox
