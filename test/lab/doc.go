// Package lab gives the end-to-end suites and the benchmark a machine of their
// own inside this one: process, mount and network namespaces with private
// /run and /tmp, an uplink bridge, a DNS server for names outside the mesh, and
// hosts made of network namespaces. Real, unmodified programs run in it, either
// as plain hosts on the bridge (Direct) or as workloads of a real `assay up`
// (Meshed); a scenario is written once and runs in both.
//
// It refuses to run without root, because namespaces of the network need it, and
// says so in one line. It mocks nothing: every process is the program that users
// run, every address is a kernel's.
//
// Invariants: nothing outside the lab's own namespaces is touched; when the
// process that made a lab ends, however it ends, the kernel ends the lab's init
// and with it every process, namespace, link, rule and mount in it. A test that
// wants to know whether Assay cleaned up behind itself asks before that
// (Lab.Leaks).
//
// Goroutines: one for each captured output and each waited-for process, ended by
// the process; one for the DNS server and one for each Capture, ended by their
// Close. All are ended by the test's cleanup.
//
// Tour: main.go (TestMain, builds), init.go (process 1 of a lab), lab.go (the
// lab), space.go (entering namespaces), process.go (programs), terminal.go (programs at a terminal), node.go (plain
// hosts), mesh.go (assay up and assay run), world.go (both behind one face),
// names.go (DNS), capture.go (packets), leaks.go (what was left behind).
package lab
