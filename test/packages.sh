#!/bin/sh
# Installs the Debian packages that the tests and benchmarks drive. Without root
# or apt-get it says what is missing; the tests that need it then skip and say so.
set -eu
cd "$(dirname "$0")"

missing=
for p in $(sed 's/#.*//' packages.txt); do
	status=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
	[ "$status" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
	echo "packages: not installed:$missing"
	echo "packages: the tests that need them will skip; as root on Debian: apt-get install$missing"
	exit 0
fi

# The packages' services must not start: the tests run servers of their own, in
# folders and namespaces of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
	trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
