#!/bin/sh
# Runs the end-to-end suites and the benchmark's tests, one package after another: each
# drives dozens of real programs, and some measure. Whatever fails is a fault.
cd "$(dirname "$0")/.." || exit
ASSAY_E2E=1 exec go test -p 1 -count 1 -timeout 15m ./bench/... ./test/...
