package control

import (
	"assay.dev/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A delta on the wire. All hosts of a mesh are told the same, and after a restart of control
// everything, at once: so what a resource says is encoded when it changes, and for a host it is
// only copied.

// deltaSize is how many bytes one message holds, unless a single resource has more. gRPC has
// buffers of 32 KB and then of 1 MB: with the large ones all hosts that come back at once would
// take more memory than everything else.
const deltaSize = 32<<10 - 64

// bodies encodes the same resource to the same bytes each time in one process, which is what
// snapshot.put compares.
var bodies = proto.MarshalOptions{Deterministic: true}

// Numbers of fields of package api's messages.
const (
	updateDelta     protowire.Number = 2 // ControlUpdate.delta
	deltaUpsert     protowire.Number = 2 // Delta.upsert
	resourceKey     protowire.Number = 1 // Resource.key
	resourceVersion protowire.Number = 2 // Resource.version
)

// appendHead appends key and version of an api.Resource. The body goes after them.
func (e *entry) appendHead(b []byte) []byte {
	b = protowire.AppendString(protowire.AppendTag(b, resourceKey, protowire.BytesType), e.key)
	return protowire.AppendVarint(protowire.AppendTag(b, resourceVersion, protowire.VarintType), e.version)
}

// size is that of the api.Resource.
func (e *entry) size() int {
	return protowire.SizeTag(resourceKey) + protowire.SizeBytes(len(e.key)) +
		protowire.SizeTag(resourceVersion) + protowire.SizeVarint(e.version) + len(e.body)
}

// resource decodes it.
func (e *entry) resource() *api.Resource {
	r := &api.Resource{}
	if err := proto.Unmarshal(append(e.appendHead(nil), e.body...), r); err != nil {
		panic("decode " + e.key + ", which was encoded here: " + err.Error())
	}
	return r
}

// deltaPage is an api.ControlUpdate with a part of a delta.
type deltaPage struct {
	delta  *api.Delta // without what is upserted
	upsert []*entry
}

// encode returns the message, in a buffer of gRPC's pool.
func (p *deltaPage) encode() (mem.BufferSlice, error) {
	head, err := proto.Marshal(p.delta)
	if err != nil {
		return nil, err
	}
	size := len(head)
	for _, e := range p.upsert {
		size += protowire.SizeTag(deltaUpsert) + protowire.SizeBytes(e.size())
	}
	pool := mem.DefaultBufferPool()
	buffer := pool.Get(protowire.SizeTag(updateDelta) + protowire.SizeBytes(size))
	b := protowire.AppendTag((*buffer)[:0], updateDelta, protowire.BytesType)
	b = append(protowire.AppendVarint(b, uint64(size)), head...)
	for _, e := range p.upsert {
		b = protowire.AppendTag(b, deltaUpsert, protowire.BytesType)
		b = append(e.appendHead(protowire.AppendVarint(b, uint64(e.size()))), e.body...)
	}
	return mem.BufferSlice{mem.NewBuffer(buffer, pool)}, nil
}

// codec is gRPC's of protocol buffers, for pages too.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(protocodec.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if p, ok := v.(*deltaPage); ok {
		return p.encode()
	}
	return c.CodecV2.Marshal(v)
}

// sendDelta sends changes in messages of bounded size; the last one is complete.
func sendDelta(stream grpc.ServerStream, ch *changes) error {
	p, size := ch.page(), 0
	// room makes room for n bytes more, with what is written before them.
	room := func(n int) error {
		if size += n + 4; size <= deltaSize || size == n+4 {
			return nil
		}
		full := p
		p, size = ch.page(), n+4
		return stream.SendMsg(full)
	}
	// Removals first: an address that moved is free before it is taken.
	for _, key := range ch.remove {
		if err := room(len(key)); err != nil {
			return err
		}
		p.delta.Remove = append(p.delta.Remove, key)
	}
	for _, e := range ch.upsert {
		if err := room(e.size()); err != nil {
			return err
		}
		p.upsert = append(p.upsert, e)
	}
	p.delta.Complete = true
	return stream.SendMsg(p)
}

func (ch *changes) page() *deltaPage {
	return &deltaPage{delta: &api.Delta{Version: ch.version, Revision: ch.revision}}
}
