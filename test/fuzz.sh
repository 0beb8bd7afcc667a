#!/bin/sh
# Runs every fuzz target of the module for the given time (10s) or count (2000x)
# each, one after another.
set -eu
cd "$(dirname "$0")/.."
time=${1:-10s}
count=0
command -v nginx >/dev/null || echo 'fuzz: nginx is not installed: FuzzReferences compares with net/http only'
for file in $(git grep -l '^func Fuzz' -- '*_test.go' | grep -v '^examples/'); do
	dir=./$(dirname "$file")
	for name in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "fuzz $dir $name"
		go test "$dir" -run '^$' -fuzz "^$name\$" -fuzztime "$time"
		count=$((count + 1))
	done
done
echo "fuzz: $count targets, $time each"
