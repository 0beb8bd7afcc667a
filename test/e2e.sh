#!/bin/sh
# Runs the end-to-end suites, one package after another. They drive dozens of real
# programs on a machine that may be busy with other things, so a package that fails is
# run once more. A second failure is a fault; a pass on the second try is said aloud,
# because it is one too, only a rarer one.
set -u
cd "$(dirname "$0")/.."
export ASSAY_E2E=1
failed=
wobbly=
for package in $(go list ./bench/... ./test/...); do
	go test -timeout 12m "$package" && continue
	echo "e2e: $package failed; once more"
	if go test -count 1 -timeout 12m "$package"; then
		wobbly="$wobbly $package"
	else
		failed="$failed $package"
	fi
done
[ -z "$wobbly" ] || echo "e2e: passed only on the second try:$wobbly"
[ -z "$failed" ] || echo "e2e: failed twice:$failed"
[ -z "$failed" ]
