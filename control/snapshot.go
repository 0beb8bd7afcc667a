package control

import (
	"bytes"
	"container/list"
	"errors"
	"unicode/utf8"

	"assay.dev/api"
)

// maxTombstones bounds how many removals are remembered for streams that lag.
const maxTombstones = 50_000

// snapshot is the newest version of every resource, in the order in which they
// changed. A stream that has version v gets what is behind v in that order. The
// model's lock guards it; entries are immutable, and may be read without it.
type snapshot struct {
	epoch      uint64
	version    uint64
	entries    map[string]*list.Element // of entry
	order      *list.List               // oldest change first
	tombstones int
	forgotten  uint64 // removals up to this version are no longer remembered
	// untold is why hosts have resources as they were before, or not at all.
	untold map[string]error
}

// entry is a resource at a version. It is encoded once, for all hosts, and kept in that form
// alone, which takes less memory than the message.
type entry struct {
	key     string
	version uint64
	body    []byte // an api.Resource without key and version; nil: removed
}

func newSnapshot(epoch uint64) *snapshot {
	return &snapshot{epoch: epoch, entries: map[string]*list.Element{}, order: list.New(), untold: map[string]error{}}
}

// put publishes a resource, which has neither key nor version yet. The same again changes nothing
// and returns false, and so does what cannot be encoded: text that is not UTF-8.
func (s *snapshot) put(key string, r *api.Resource) bool {
	body, err := bodies.Marshal(r)
	if err == nil && !utf8.ValidString(key) {
		err = errors.New("its name is not UTF-8")
	}
	if err != nil {
		s.untold[key] = err
		return false
	}
	delete(s.untold, key)
	if el := s.entries[key]; el != nil && el.Value.(*entry).body != nil && bytes.Equal(el.Value.(*entry).body, body) {
		return false
	}
	s.version++
	s.place(&entry{key: key, version: s.version, body: body})
	return true
}

// remove withdraws a resource.
func (s *snapshot) remove(key string) bool {
	delete(s.untold, key)
	el := s.entries[key]
	if el == nil || el.Value.(*entry).body == nil {
		return false
	}
	s.version++
	s.place(&entry{key: key, version: s.version})
	return true
}

func (s *snapshot) place(e *entry) {
	if el := s.entries[e.key]; el != nil {
		if el.Value.(*entry).body == nil {
			s.tombstones--
		}
		s.order.Remove(el)
	}
	if e.body == nil {
		s.tombstones++
	}
	s.entries[e.key] = s.order.PushBack(e)
}

// has reports whether there is a resource.
func (s *snapshot) has(key string) bool {
	el := s.entries[key]
	return el != nil && el.Value.(*entry).body != nil
}

// get returns a resource, nil when there is none. It decodes it anew each time.
func (s *snapshot) get(key string) *api.Resource {
	if !s.has(key) {
		return nil
	}
	return s.entries[key].Value.(*entry).resource()
}

// changes is what leads from one version to the newest.
type changes struct {
	version uint64
	upsert  []*entry
	remove  []string
	// revision of the store that it follows from, if others share that.
	revision int64
}

// since returns what changed after version v; ok is false when removals after v
// are no longer known.
func (s *snapshot) since(v uint64) (c changes, ok bool) {
	c.version = s.version
	if v < s.forgotten {
		return c, false
	}
	el := s.order.Back()
	for ; el != nil && el.Value.(*entry).version > v; el = el.Prev() {
	}
	if el == nil {
		el = s.order.Front()
	} else {
		el = el.Next()
	}
	for ; el != nil; el = el.Next() {
		if e := el.Value.(*entry); e.body != nil {
			c.upsert = append(c.upsert, e)
		} else {
			c.remove = append(c.remove, e.key)
		}
	}
	return c, true
}

// resume returns what leads from what a host has kept to the newest version. What
// it kept of another epoch is worth nothing but the keys to forget.
func (s *snapshot) resume(epoch uint64, known map[string]uint64) changes {
	c := changes{version: s.version}
	for el := s.order.Front(); el != nil; el = el.Next() {
		e := el.Value.(*entry)
		if e.body != nil && (epoch != s.epoch || known[e.key] != e.version) {
			c.upsert = append(c.upsert, e)
		}
	}
	for key := range known {
		if !s.has(key) {
			c.remove = append(c.remove, key)
		}
	}
	return c
}

// prune forgets removals that every stream has (least is the lowest version that
// one has), and beyond the bound those that not all have.
func (s *snapshot) prune(least uint64) {
	for el := s.order.Front(); el != nil && s.tombstones > 0; {
		e, next := el.Value.(*entry), el.Next()
		if e.version > least && s.tombstones <= maxTombstones {
			return
		}
		if e.body == nil {
			s.order.Remove(el)
			delete(s.entries, e.key)
			s.tombstones--
			s.forgotten = e.version
		}
		el = next
	}
}
