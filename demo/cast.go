package demo

import (
	"strconv"

	"assay.dev"
)

// Namespaces of the demo. Plaintext from outside is served in front, and listed as an
// exception; in bank it is refused.
const (
	front = "front"
	bank  = "bank"
)

// Marker is in every payload of the bank (examples/bank says why). Finding it in a
// packet is finding clear text.
const Marker = "XX00ASSAYBANK"

// manifest is the whole intent that the demo needs: which namespace is strict.
const manifest = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata:
  name: default
  namespace: bank
spec:
  mode: strict
`

// member is a service of the bank, started with `assay run`.
type member struct {
	namespace string
	name      string
	replicas  int
	port      uint16
	args      []string // of the bank's binary
}

// cast is the bank. The order does not matter: the programs wait for each other as
// real ones do.
var cast = []member{
	{bank, "events", 1, 4222, []string{"events"}},
	{bank, "ledger", 1, 8080, []string{"ledger"}},
	{bank, "accounts", 2, 8080, []string{"accounts"}},
	{bank, "payments", 1, 50051, []string{"payments"}},
	{front, "web", 1, 8080, []string{"web", "--accounts", "http://accounts.bank:8080", "--payments", "payments.bank:50051", "--events", "nats://events.bank:4222"}},
}

// runArgs are the arguments of `assay run` for one replica of m. flags come before
// the command.
func (m *member) runArgs(bankBinary string, flags ...string) []string {
	args := []string{"run", "--namespace", m.namespace, "--service", m.name}
	if m.port != 0 {
		args = append(args, "--port", strconv.Itoa(int(m.port)))
	}
	args = append(args, flags...)
	return append(append(args, "--", bankBinary), m.args...)
}

// want is an edge that must be there.
type want struct {
	client, server name
	port           uint16
}

// name is an identity without its trust domain.
type name struct{ namespace, account string }

func (n name) String() string { return n.namespace + "/" + n.account }

func nameOf(id assay.Identity) name {
	if id.IsZero() {
		return name{}
	}
	return name{id.Namespace, id.Account}
}

// Clients that the demo and its check start besides the cast.
var (
	load  = name{front, "load"}
	probe = name{front, "probe"}
)

var (
	events   = name{bank, "events"}
	ledger   = name{bank, "ledger"}
	accounts = name{bank, "accounts"}
	payments = name{bank, "payments"}
	web      = name{front, "web"}
)

// wanted is who talks to whom in the bank: nothing else may.
var wanted = []want{
	{load, web, 8080},
	{web, accounts, 8080},
	{web, payments, 50051},
	{web, events, 4222},
	{accounts, ledger, 8080},
	{payments, accounts, 8080},
	{payments, ledger, 8080},
	{payments, events, 4222},
	{ledger, events, 4222},
	{probe, events, 4222},
}
