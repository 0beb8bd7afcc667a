package attacks

import (
	"strings"
	"testing"

	"assay.dev/test/lab"
)

// inside is what a workload tries that runs as root and was taken over. It prints a
// line for each attempt that succeeds. Every attempt has a twin that must succeed, or
// one that fails for another reason would prove nothing.
const inside = `
broke() { echo "broke out: $*"; }
try() { what=$1; shift; "$@" >/dev/null 2>&1 && broke "$what"; }
must() { what=$1; shift; "$@" >/dev/null 2>&1 || echo "cannot even $what"; }
write() { echo "$1" >"$2"; }
named() { for p in /proc/[0-9]*; do case "$(cat $p/cmdline 2>/dev/null | tr '\0' ' ')" in $1) echo ${p#/proc/};; esac; done | head -1; }
proxy=$(named "assay-proxy $ASSAY_WORKLOAD*") up=$(named "* up --data *")
[ -n "$proxy" ] && [ -n "$up" ] || echo "the proxy ($proxy) and assay up ($up) were not found"

# What belongs to agent and control.
for dir in /tmp/assay-data /run/assay; do
	[ -d $dir ] || echo "$dir is not there"
	[ -z "$(ls -A $dir)" ] || broke "sees what is in $dir"
	try "uncovers $dir" umount $dir
	try "uncovers $dir as root of a user namespace" unshare -Urm umount $dir
	try "writes to $dir" touch $dir/file
done
must "run assay" $ASSAY help
try "is an operator" $ASSAY get hosts
try "starts workloads" $ASSAY run --service more -- true
try "enters assay up's mounts" ls /proc/$up/root/run/assay/

# Other processes.
sleep 60 & must "signal a process of its own" kill -0 $!
must "look into a process of its own" ls /proc/$!/root/
kill $!
for pid in $proxy $up $PPID; do
	try "signals $(tr '\0' ' ' </proc/$pid/cmdline)" kill -0 $pid
	try "looks into $(tr '\0' ' ' </proc/$pid/cmdline)" ls /proc/$pid/root/
	try "reads the environment of $(tr '\0' ' ' </proc/$pid/cmdline)" cat /proc/$pid/environ
	try "reads the memory of $(tr '\0' ' ' </proc/$pid/cmdline)" cat /proc/$pid/maps
	try "enters the network of $(tr '\0' ' ' </proc/$pid/cmdline)" nsenter -t $pid -n true
done

# Its own network.
must "read a setting" cat /proc/sys/net/ipv4/ip_nonlocal_bind
try "changes a setting of its network" write 1 /proc/sys/net/ipv4/ip_nonlocal_bind
try "changes a setting of the machine" write "$(cat /proc/sys/kernel/panic)" /proc/sys/kernel/panic
try "mounts proc again and changes a setting" unshare -Urmpf sh -c 'mount -t proc proc /proc && echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind'
must "see its link" ip link show eth0
try "removes its rules" nft flush ruleset
try "removes its rules as root of a user namespace" unshare -Ur nft flush ruleset
try "takes an address" ip addr add 10.181.0.99/24 dev eth0
try "takes a route" ip route add 192.0.2.0/24 dev eth0
try "mounts" mount -t tmpfs none /mnt
try "replaces its resolver" umount /etc/resolv.conf
must "run perl" perl -e 1
# Packets, raw IP, and the mark that its proxy has.
try "opens a packet socket" perl -e 'socket(S, 17, 3, 0x300) or die'
try "opens a raw socket" perl -e 'socket(S, 2, 3, 255) or die'
must "open a socket" perl -e 'socket(S, 2, 1, 6) or die'
try "sets the proxies' mark" perl -e 'socket(S, 2, 1, 6) or die; setsockopt(S, 1, 36, pack("L", 0x41535301)) or die'
try "speaks from a foreign address" perl -e 'socket(S, 2, 1, 6) or die; setsockopt(S, 0, 19, pack("L", 1)) or die'
echo tried
`

// A workload that runs as root, with the capabilities that assay run leaves it, can do
// nothing to agent, control, its own proxy and its own capture.
func TestRootInsideAWorkload(t *testing.T) {
	m := lab.New(t).StartMesh(t)
	out := m.Exec(t, "env", "ASSAY="+m.Assay, m.Assay, "run", "--service", "evil", "--", "sh", "-c", inside)
	text := out.Stdout + out.Stderr
	if !strings.Contains(text, "tried") {
		t.Fatalf("the attempts did not come to their end:\n%s", text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "broke out") || strings.HasPrefix(line, "cannot even") || strings.Contains(line, "not found") || strings.Contains(line, "is not there") {
			t.Error(strings.TrimSpace(line))
		}
	}
	m.Finish(t)
}
