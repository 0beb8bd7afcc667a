package http2

import "encoding/binary"

// preface begins every connection of a client (RFC 9113 section 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

const (
	frameHeader = 9
	// maxFrame is the largest payload that we take and, whatever the peer allows,
	// send: the least that everybody must take, and one TLS record.
	maxFrame = 16 << 10
)

// Frame types (RFC 9113 section 6).
const (
	frameData = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePush
	framePing
	frameGoaway
	frameWindow
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

const (
	settingTableSize   = 1
	settingPush        = 2
	settingMaxStreams  = 3
	settingWindow      = 4
	settingMaxFrame    = 5
	settingMaxHeadList = 6
	settingConnect     = 8 // RFC 8441
)

const (
	initialWindow = 65535
	maxWindow     = 1<<31 - 1
)

// ErrCode is an error code of RFC 9113 section 7.
type ErrCode uint32

const (
	NoError ErrCode = iota
	ProtocolError
	InternalError
	FlowControlError
	SettingsTimeout
	StreamClosed
	FrameSizeError
	RefusedStream
	Cancel
	CompressionError
	ConnectError
	EnhanceYourCalm
	InadequateSecurity
	HTTP11Required
)

type header struct {
	length      int
	kind, flags byte
	stream      uint32
}

func parseHeader(b []byte) header {
	_ = b[8]
	return header{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   b[3],
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]) &^ (1 << 31),
	}
}

func appendHeader(b []byte, length int, kind, flags byte, stream uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendReset(b []byte, id uint32, code ErrCode) []byte {
	b = appendHeader(b, 4, frameReset, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendWindow(b []byte, id uint32, n int) []byte {
	b = appendHeader(b, 4, frameWindow, 0, id)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendPing(b []byte, flags byte, payload []byte) []byte {
	b = appendHeader(b, 8, framePing, flags, 0)
	return append(b, payload[:8]...)
}

func appendGoaway(b []byte, last uint32, code ErrCode, text string) []byte {
	b = appendHeader(b, 8+len(text), frameGoaway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, text...)
}

type setting struct {
	id    uint16
	value uint32
}

func appendSettings(b []byte, list ...setting) []byte {
	b = appendHeader(b, 6*len(list), frameSettings, 0, 0)
	for _, s := range list {
		b = binary.BigEndian.AppendUint16(b, s.id)
		b = binary.BigEndian.AppendUint32(b, s.value)
	}
	return b
}

// unpad removes the padding of a payload (RFC 9113 section 6.1).
func unpad(h header, p []byte) ([]byte, bool) {
	if h.flags&flagPadded == 0 {
		return p, true
	}
	if len(p) == 0 || int(p[0]) >= len(p) {
		return nil, false
	}
	return p[1 : len(p)-int(p[0])], true
}
