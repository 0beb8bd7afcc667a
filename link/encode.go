package link

import (
	"encoding/json"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Encoded is a body in the form in which it travels: what goes to many proxies is encoded
// once. It is a body of Send, also for several goroutines at a time.
type Encoded struct {
	inline []byte
	large  *os.File // a sealed memfd, when it is too long for a packet; nil: none
}

// Encode encodes a body.
func Encode(body any) (*Encoded, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	if len(raw) <= MaxInline-256 {
		return &Encoded{inline: raw}, nil
	}
	fd, err := sealedCopy(raw)
	if err != nil {
		return nil, err
	}
	return &Encoded{large: os.NewFile(uintptr(fd), "message")}, nil
}

// close gives up the memfd; without it, the collector does.
func (e *Encoded) close() {
	if e.large != nil {
		e.large.Close()
	}
}

// packet is a message's envelope with e, or nil, in it. See envelope for its form.
func (e *Encoded) packet(kind Kind, id uint64) []byte {
	b := make([]byte, 0, 64+len(kind))
	if e != nil {
		b = make([]byte, 0, 64+len(kind)+len(e.inline))
	}
	b = strconv.AppendQuote(append(b, `{"kind":`...), string(kind))
	if id != 0 {
		b = strconv.AppendUint(append(b, `,"id":`...), id, 10)
	}
	if e != nil && e.large != nil {
		b = append(b, `,"large":true`...)
	} else if e != nil {
		b = append(append(b, `,"body":`...), e.inline...)
	}
	return append(b, '}')
}

// encoded is body as it travels, and what gives it up after that.
func encoded(body any) (e *Encoded, done func(), err error) {
	if e, is := body.(*Encoded); is {
		return e, func() {}, nil
	}
	if body == nil {
		return nil, func() {}, nil
	}
	e, err = Encode(body)
	if err != nil {
		return nil, nil, err
	}
	return e, e.close, nil
}

// rights are the descriptors that go along, the body's last.
func (e *Encoded) rights(files []int) []byte {
	if e != nil && e.large != nil {
		files = append(files[:len(files):len(files)], int(e.large.Fd()))
	}
	if len(files) == 0 {
		return nil
	}
	return unix.UnixRights(files...)
}
