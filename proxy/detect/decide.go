package detect

import (
	"time"

	"assay.dev"
)

const (
	// Patience is how long a silent client is waited for before its connection to
	// the server is opened.
	Patience = 4 * time.Millisecond
	// Dribble bounds how long a client may take to complete its first line.
	Dribble = time.Second
	// Hold bounds how long an HTTP/2 server's preface is held back for a client that
	// says nothing: one that waits for it must not wait for ever.
	Hold = time.Second
)

// Action is what the caller does next.
type Action uint8

const (
	Wait   Action = iota // for a byte, an end, or Decision.For (0: for ever)
	Open                 // the connection to the server, and ask again
	Settle               // Decision.Protocol it is
)

// Input is what is known about a connection.
type Input struct {
	Declared   assay.Protocol
	Learned    bool // Memory.ServerFirst
	Client     []byte
	ClientEnd  bool // the client finished sending
	Server     []byte
	ServerEnd  bool
	Opened     bool          // the connection to the server is open, or being opened
	Age        time.Duration // since accept
	ClientAge  time.Duration // since the client's first byte
	ServerAge  time.Duration // since the server's first byte
	NoPatience bool          // never open before the client spoke (a port with routes)
}

// Outcome names a decision in the metrics.
type Outcome string

const (
	Declared       Outcome = "declared"
	ClientHTTP1    Outcome = "client-http1"
	ClientHTTP2    Outcome = "client-http2"
	ClientTLS      Outcome = "client-tls"
	ClientOpaque   Outcome = "client-opaque"
	ClientDribbled Outcome = "client-dribbled" // did not finish its first line in time
	ClientClosed   Outcome = "client-closed"   // sent nothing: a check, or it only reads
	ServerFirst    Outcome = "server-first"
	ServerHTTP2    Outcome = "server-http2" // its SETTINGS were all that anybody said
	ServerClosed   Outcome = "server-closed"
)

// Decision is what to do next.
type Decision struct {
	Action   Action
	Protocol assay.Protocol
	Outcome  Outcome
	For      time.Duration
}

// Decide applies the rules in the package's documentation.
func Decide(in Input) Decision {
	if in.Declared != assay.Detect {
		return Decision{Action: Settle, Protocol: in.Declared, Outcome: Declared}
	}
	var limit time.Duration // until something changes without a byte; 0: nothing does
	if len(in.Client) > 0 {
		proto, done := Client(in.Client)
		switch {
		case done || in.ClientEnd:
			return Decision{Action: Settle, Protocol: proto, Outcome: clientOutcome(proto)}
		case in.ClientAge >= Dribble:
			return Decision{Action: Settle, Protocol: proto, Outcome: ClientDribbled}
		}
		limit = Dribble - in.ClientAge
	} else if in.ClientEnd {
		return Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ClientClosed}
	}
	switch speech := Server(in.Server); {
	case speech == Other:
		return Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerFirst}
	case in.ServerEnd:
		return Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerClosed}
	case speech == Settings && in.ServerAge >= Hold:
		return Decision{Action: Settle, Protocol: assay.HTTP2, Outcome: ServerHTTP2}
	case speech == Partial && in.ServerAge >= Hold:
		return Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerFirst}
	case speech == Settings || speech == Partial:
		limit = sooner(limit, Hold-in.ServerAge)
	}
	if !in.Opened && !in.NoPatience {
		if in.Learned || in.Age >= Patience {
			return Decision{Action: Open}
		}
		limit = sooner(limit, Patience-in.Age)
	}
	return Decision{Action: Wait, For: limit}
}

func sooner(limit, d time.Duration) time.Duration {
	if limit == 0 {
		return d
	}
	return min(limit, d)
}

func clientOutcome(p assay.Protocol) Outcome {
	switch p {
	case assay.HTTP1:
		return ClientHTTP1
	case assay.HTTP2:
		return ClientHTTP2
	case assay.TLS:
		return ClientTLS
	}
	return ClientOpaque
}
