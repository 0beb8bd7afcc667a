#!/bin/sh
# Runs the end-to-end suites and the benchmark's tests, one package after another: each
# drives dozens of real programs, and some measure. Whatever fails is a fault. So is the
# data plane's overload, which takes a minute, and on clusters of one node what docs/kubernetes.md
# lets a reader try, and pods that join and leave as they run; the other suites of Kubernetes are
# `make test-kubernetes`, and .ci/run knows which are here.
cd "$(dirname "$0")/.." || exit
export ASSAY_E2E=1
failed=0
go test -count 1 -timeout 5m -run '^TestOverload$' ./cmd/assay-proxy || failed=1
go test -p 1 -count 1 -timeout 15m ./bench/... ./test/... || failed=1
ASSAY_KUBERNETES=1 go test -count 1 -timeout 50m -run '^(TestOneNode|TestTry|TestNode)$' ./test/kubernetes || failed=1
exit $failed
