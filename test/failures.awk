# Passes on, of what `go test` says, all of the tests that failed or were skipped and, with -v,
# one line of each that passed, and why parts of it were skipped: what failed is found without
# reading what did not. At the very
# end it says once more why each failed, in as much as CI keeps of an output's end (2,000
# characters): of each test that failed, and has no part that did, the last of what it said.
# What a suite says "for the record" is no reason.
BEGIN { room = 1700; test = "a crash" }
{ collect() }
/^=== RUN +[^\/]+$/ { inside = 1 }
inside { said = said $0 "\n" }
inside && /^ +[^ :]+\.go:[0-9]+: skipped: / { skipped = skipped $0 "\n" }
!inside { print }
/^--- / {
	if (/^--- PASS/) printf "%s%s", $0 "\n", skipped
	else printf "%s", said
	inside = 0
	said = skipped = ""
}
{ fflush() }
END {
	printf "%s", said # it crashed, or time was up
	why()
}

# collect notes which test speaks, what it says, and whether it failed. A message is open
# for as many lines as it may still have.
function collect() {
	if (/^=== [A-Z]+ +[^ ]/ || /^ *--- [A-Z]+: /) {
		test = $3
		open = 0
		if ($2 == "FAIL:") fail(test)
	} else if (/^(panic|fatal error): |^WARNING: DATA RACE/) {
		fail(test)
		begin(12)
	} else if (/^ +[^ :]+\.go:[0-9]+: for the record/) {
		open = 0
	} else if (/^ +[^ :]+\.go:[0-9]+: /) {
		begin(40)
	} else if (/^FAIL\t/) { # without a test that says why: it was not built, or exited
		if (tests == before) {
			fail(test = $2)
			begin(0)
		}
		before = tests
		test = "a crash"
		open = 0
	} else if (/^(FAIL|ok|\?)/) {
		open = 0
	} else if (open > 0 && NF) {
		message[test, count[test]] = message[test, count[test]] "\n" clip($0, 300)
		open--
	}
}

function begin(more) {
	message[test, ++count[test]] = clip($0, 300)
	open = more
}

function fail(name) {
	if (name in failed) return
	failed[name] = 1
	order[++tests] = name
	while (sub(/\/[^\/]*$/, "", name)) inParts[name] = 1
}

# why gives each test its share of the room, and of that its last message half at most if
# there are others.
function why(    i, n, name, left, m, part, text) {
	for (i = 1; i <= tests; i++) if (!(order[i] in inParts)) n++
	if (!n) return
	print "\nwhat failed, and why:"
	for (i = 1; i <= tests; i++) {
		name = order[i]
		if (name in inParts) continue
		left = room / n--
		if (left < 200) left = 200
		room -= left
		left -= length(name)
		text = ""
		for (m = count[name]; m > 0 && left > 60; m--) {
			part = clip(message[name, m], m > 1 && !text ? left / 2 : left)
			text = part "\n" text
			left -= length(part) + 1
		}
		if (left > 0) room += left
		printf "%s\n%s", name, text
	}
}

function clip(s, most) { return length(s) > most ? substr(s, 1, most - 3) "..." : s }
