package http1

// chunkState is where in a chunked body (RFC 9112 section 7.1) the next byte falls.
// The white space that the grammar tolerates before an extension is refused.
type chunkState struct {
	step   chunkStep
	digits uint8
	ext    int // bytes of extensions that data did not outweigh yet
	// The trailer section.
	size   int // bytes
	fields int
	nameN  int
	name   [23]byte // of the current field; a longer one is none of those that matter
}

type chunkStep uint8

const (
	chunkSize     chunkStep = iota // digits
	chunkExtSpace                  // white space that only an extension may follow
	chunkExt
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	trailerStart // of a line
	trailerName
	trailerValue
	trailerLF
	trailerEndLF // of the empty line
	chunkDone
)

// advanceChunks steps through p. Data is skipped in one step; the rest is a few
// bytes for each chunk.
func (b *Body) advanceChunks(p []byte) (int, *Refusal) {
	s := &b.chunk
	for i := 0; i < len(p); i++ {
		c := p[i]
		switch s.step {
		case chunkSize:
			d, ok := unhex(c)
			if ok {
				if s.digits++; s.digits > 16 || b.left >= 1<<58 {
					return i, ErrChunkLarge
				}
				b.left = b.left<<4 | int64(d)
				continue
			}
			if s.digits == 0 {
				return i, ErrChunkSize
			}
			switch c {
			case '\r':
				s.step = chunkSizeLF
			case ';':
				s.step = chunkExt
				s.ext++
			default:
				return i, ErrChunkSize
			}
		case chunkExt:
			if c == '\r' {
				s.step = chunkSizeLF
				continue
			}
			if s.ext++; s.ext > b.lim.Ext || c < 0x20 && c != '\t' || c == 0x7f {
				return i, ErrChunkExt
			}
		case chunkSizeLF:
			if c != '\n' {
				return i, ErrChunkSize
			}
			s.digits = 0
			if b.left == 0 {
				s.step = trailerStart
				continue
			}
			s.ext -= int(min(int64(s.ext), b.left))
			s.step = chunkData
		case chunkData:
			n := int(min(int64(len(p)-i), b.left))
			b.left -= int64(n)
			i += n - 1
			if b.left == 0 {
				s.step = chunkDataCR
			}
		case chunkDataCR:
			if c != '\r' {
				return i, ErrChunkEnd
			}
			s.step = chunkDataLF
		case chunkDataLF:
			if c != '\n' {
				return i, ErrChunkEnd
			}
			s.step = chunkSize
		case chunkDone:
			return i, nil
		default:
			if err := b.trailer(c); err != nil {
				return i, err
			}
		}
	}
	return len(p), nil
}

// trailer takes one byte of the trailer section.
func (b *Body) trailer(c byte) *Refusal {
	s := &b.chunk
	if s.size++; s.size > b.lim.Head {
		return ErrTrailerLength
	}
	switch s.step {
	case trailerStart:
		if c == '\r' {
			s.step = trailerEndLF
			return nil
		}
		if s.fields++; s.fields > b.lim.Fields {
			return ErrTrailerLength
		}
		s.step, s.nameN = trailerName, 0
		return b.trailerName(c)
	case trailerName:
		return b.trailerName(c)
	case trailerValue:
		if c == '\r' {
			s.step = trailerLF
		} else if c < 0x20 && c != '\t' || c == 0x7f {
			return ErrTrailer
		}
	case trailerLF:
		if c != '\n' {
			return ErrTrailer
		}
		s.step = trailerStart
	case trailerEndLF:
		if c != '\n' {
			return ErrTrailer
		}
		s.step = chunkDone
	}
	return nil
}

func (b *Body) trailerName(c byte) *Refusal {
	s := &b.chunk
	if c == ':' && s.nameN > 0 {
		if s.nameN <= len(s.name) && (forbiddenTrailer(s.name[:s.nameN]) || b.edit != nil && b.edit.Drops(s.name[:s.nameN])) {
			return ErrTrailerField
		}
		s.step = trailerValue
		return nil
	}
	if class[c]&tokenByte == 0 {
		return ErrTrailer
	}
	if s.nameN < len(s.name) {
		s.name[s.nameN] = c
	}
	s.nameN++
	return nil
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10, true
	}
	return 0, false
}
