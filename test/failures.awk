# Passes on, of what `go test -v` says, all of the tests that failed or were skipped, and one
# line of each that passed: what failed is found without reading what did not.
/^=== RUN +[^\/]+$/ { inside = 1 }
inside { said = said $0 "\n" }
!inside { print }
/^--- / { if (/^--- PASS/) print; else printf "%s", said; inside = 0; said = "" }
{ fflush() }
END { printf "%s", said } # it crashed, or time was up
