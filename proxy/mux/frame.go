package mux

import "encoding/binary"

// The wire, in short (docs/transport.md is the specification): each side sends the
// preface, then frames of an 8-byte header (flags and type, length, stream, big
// endian) and a payload. The first frame is SETTINGS.

const preface = "ASSAYMUX"

const version = 1

const (
	headerSize = 8
	// maxWindow is the most credit that a stream can have.
	maxWindow = 16 << 20
	// maxPayload is what a DATA frame carries at most. A frame so long is several TLS
	// records and one write at both ends.
	maxPayload = 64 << 10
	// maxWhole is the longest frame that a receiver holds until it is whole: all
	// frames but DATA, and DATA up to this.
	maxWhole = 16<<10 - headerSize
)

const (
	frameSettings = iota + 1
	frameOpen
	frameData
	frameReset
	frameCredit
	framePing
	framePong
	frameGoaway
	frameShut
)

// flagFin ends a direction on OPEN and DATA, and the session on GOAWAY.
const flagFin = 1

const (
	settingWindow = iota + 1
	settingMaxStreams
	settingMaxOpen
)

// What a side may assume of its peer before it has read the peer's settings. Window
// and open payload may not be set to less; streams may, those in excess are refused.
const (
	initialWindow  = 16 << 10
	initialOpen    = 4 << 10
	initialStreams = 1000
)

// minCredit is the least that a CREDIT frame grants: it bounds their number by the
// bytes that earned them. A quarter of the least window, so that it never stalls.
const minCredit = initialWindow / 4

const (
	settingsSize = headerSize + 2 + 3*6
	resetSize    = headerSize + 2
	creditSize   = headerSize + 4
	maxGoodbye   = 256 // bytes of text in GOAWAY
)

type header struct {
	kind, flags byte
	length      int
	stream      uint32
}

func parseHeader(b []byte) header {
	_ = b[7]
	return header{b[0] & 15, b[0] >> 4, int(b[1])<<16 | int(b[2])<<8 | int(b[3]), binary.BigEndian.Uint32(b[4:])}
}

func appendHeader(b []byte, kind, flags byte, length int, stream uint32) []byte {
	return append(b, flags<<4|kind, byte(length>>16), byte(length>>8), byte(length), byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendPreface(b []byte, cfg *Config) []byte {
	b = append(b, preface...)
	b = appendHeader(b, frameSettings, 0, settingsSize-headerSize, 0)
	b = binary.BigEndian.AppendUint16(b, version)
	b = appendSetting(b, settingWindow, cfg.Window)
	b = appendSetting(b, settingMaxStreams, cfg.MaxStreams)
	return appendSetting(b, settingMaxOpen, cfg.MaxOpen)
}

func appendSetting(b []byte, id uint16, value int) []byte {
	b = binary.BigEndian.AppendUint16(b, id)
	return binary.BigEndian.AppendUint32(b, uint32(value))
}

// appendOpen writes an OPEN frame with n bytes of data; the caller appends them.
func appendOpen(b []byte, flags byte, id uint32, open, data []byte) []byte {
	b = appendHeader(b, frameOpen, flags, 2+len(open)+len(data), id)
	b = binary.BigEndian.AppendUint16(b, uint16(len(open)))
	b = append(b, open...)
	return append(b, data...)
}

func appendReset(b []byte, id uint32, code Code) []byte {
	b = appendHeader(b, frameReset, 0, 2, id)
	return binary.BigEndian.AppendUint16(b, uint16(code))
}

func appendCredit(b []byte, id uint32, n int) []byte {
	b = appendHeader(b, frameCredit, 0, 4, id)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendShut(b []byte, id uint32) []byte { return appendHeader(b, frameShut, 0, 0, id) }

func appendPing(b []byte, kind byte, payload uint64) []byte {
	b = appendHeader(b, kind, 0, 8, 0)
	return binary.BigEndian.AppendUint64(b, payload)
}

// appendGoaway writes a GOAWAY: last is the highest stream of the peer that was
// looked at, so that the peer knows which of its streams were never read.
func appendGoaway(b []byte, flags byte, last uint32, text string) []byte {
	text = text[:min(len(text), maxGoodbye)]
	b = appendHeader(b, frameGoaway, flags, 4+len(text), 0)
	b = binary.BigEndian.AppendUint32(b, last)
	return append(b, text...)
}

// peerSettings are what the peer allows us.
type peerSettings struct {
	window, maxStreams, maxOpen int
}

// parseSettings checks a SETTINGS payload: ascending ids, unknown ones ignored.
func parseSettings(p []byte) (peerSettings, *Error) {
	set := peerSettings{initialWindow, initialStreams, initialOpen}
	if len(p) < 2 || (len(p)-2)%6 != 0 {
		return set, broken("settings-length")
	}
	if binary.BigEndian.Uint16(p) != version {
		return set, broken("version")
	}
	last := uint16(0)
	for p = p[2:]; len(p) > 0; p = p[6:] {
		id, v := binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])
		if id <= last {
			return set, broken("settings-order")
		}
		last = id
		switch id {
		case settingWindow:
			if v < initialWindow || v > maxWindow {
				return set, broken("settings-window")
			}
			set.window = int(v)
		case settingMaxStreams:
			if v < 1 || v > 1<<20 {
				return set, broken("settings-max-streams")
			}
			set.maxStreams = int(v)
		case settingMaxOpen:
			if v < initialOpen || v > 15<<10 {
				return set, broken("settings-max-open")
			}
			set.maxOpen = int(v)
		}
	}
	return set, nil
}
