package main

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A host reads of each piece of the snapshot its key and version and leaves the rest, so that
// a hundred hosts cost less than control does.

// encoded is a message that was encoded before.
type encoded []byte

// unread is a message that its taker reads. It is valid during the call alone.
type unread struct{ take func([]byte) error }

// lazy is gRPC's codec of protocol buffers, for those two as well.
type lazy struct{}

func (lazy) Name() string { return "proto" }

func (lazy) Marshal(v any) (mem.BufferSlice, error) {
	switch v := v.(type) {
	case encoded:
		return mem.BufferSlice{mem.SliceBuffer(v)}, nil
	case proto.Message:
		b, err := proto.Marshal(v)
		return mem.BufferSlice{mem.SliceBuffer(b)}, err
	}
	return nil, fmt.Errorf("encode a %T", v)
}

func (lazy) Unmarshal(data mem.BufferSlice, v any) error {
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	switch v := v.(type) {
	case unread:
		return v.take(b.ReadOnlyData())
	case proto.Message:
		return proto.Unmarshal(b.ReadOnlyData(), v)
	}
	return fmt.Errorf("decode a %T", v)
}

var _ encoding.CodecV2 = lazy{}

// fields calls each with the fields of a message.
func fields(b []byte, each func(number protowire.Number, value []byte, integer uint64) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value []byte
		var integer uint64
		switch kind {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			integer, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := each(number, value, integer); err != nil {
			return err
		}
	}
	return nil
}
