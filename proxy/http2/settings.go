package http2

import (
	"encoding/binary"
	"time"
)

func (c *conn) onSettings(h header, p []byte) *Refusal {
	switch {
	case h.stream != 0:
		return ErrStreamID
	case h.flags&flagAck != 0:
		if len(p) != 0 {
			return ErrFrameSize
		}
		c.onAck()
		return nil
	case len(p)%6 != 0:
		return ErrFrameSize
	}
	if why := c.flood.count(floodSettings); why != nil {
		return why
	}
	if !c.settled {
		c.settled = true
		c.setDeadline(time.Time{})
		c.peerMax = 1 << 30 // whoever sets no limit has none
	}
	window := c.peerWindow
	for ; len(p) > 0; p = p[6:] {
		if why := c.setting(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])); why != nil {
			return why
		}
	}
	// Before what they allow: whoever waits for it may not look for that earlier.
	c.out = appendHeader(c.out, 0, frameSettings, flagAck, 0)
	if c.peerWindow > window {
		c.streams.each((*stream).unblock)
	}
	c.limit.Store(int32(min(c.peerMax, 1<<30)))
	c.admit()
	return nil
}

// setting takes one of the peer's settings. Unknown ones are ignored.
func (c *conn) setting(id uint16, v uint32) *Refusal {
	switch id {
	case settingTableSize:
		c.enc.SetMaxDynamicTableSize(min(v, 4096))
	case settingPush:
		if v > 1 || v == 1 && !c.server {
			return ErrSetting
		}
	case settingMaxStreams:
		c.peerMax = int(min(v, 1<<30))
	case settingWindow:
		if v > maxWindow {
			return ErrSettingWin
		}
		more := int(v) - c.peerWindow
		c.peerWindow = int(v)
		var why *Refusal
		c.streams.each(func(x *stream) {
			if x.sendWin += more; x.sendWin > maxWindow {
				why = ErrSettingWin
			}
		})
		return why
	case settingMaxFrame:
		if v < 16<<10 || v > 1<<24-1 {
			return ErrSetting
		}
	case settingConnect:
		if v > 1 || v == 0 && c.peerConnect {
			return ErrSetting
		}
		c.peerConnect = v == 1
	}
	return nil
}

// admit lets streams begin that waited for the application to allow one more; mu is held.
func (c *conn) admit() {
	for c.settled && c.streams.n < c.peerMax && c.pending.head != nil {
		c.ready.push(c.pending.pop())
		if len(c.out) >= bulkQueued {
			break
		}
		c.pump()
	}
}
