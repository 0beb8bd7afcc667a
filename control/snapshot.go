package control

import (
	"container/list"

	"assay.dev/api"
	"google.golang.org/protobuf/proto"
)

// maxTombstones bounds how many removals are remembered for streams that lag.
const maxTombstones = 50_000

// snapshot is the newest version of every resource, in the order in which they
// changed. A stream that has version v gets what is behind v in that order. The
// model's lock guards it; resources in it are immutable.
type snapshot struct {
	epoch      uint64
	version    uint64
	entries    map[string]*list.Element // of entry
	order      *list.List               // oldest change first
	tombstones int
	forgotten  uint64 // removals up to this version are no longer remembered
}

type entry struct {
	key      string
	version  uint64
	resource *api.Resource // nil: removed
}

func newSnapshot(epoch uint64) *snapshot {
	return &snapshot{epoch: epoch, entries: map[string]*list.Element{}, order: list.New()}
}

// put publishes a resource; body is only read from now on. The same again changes
// nothing and returns false.
func (s *snapshot) put(key string, body *api.Resource) bool {
	if el := s.entries[key]; el != nil {
		old := el.Value.(*entry)
		if old.resource != nil {
			body.Key, body.Version = key, old.version
			if proto.Equal(old.resource, body) {
				return false
			}
		}
	}
	s.version++
	body.Key, body.Version = key, s.version
	s.place(&entry{key: key, version: s.version, resource: body})
	return true
}

// remove withdraws a resource.
func (s *snapshot) remove(key string) bool {
	el := s.entries[key]
	if el == nil || el.Value.(*entry).resource == nil {
		return false
	}
	s.version++
	s.place(&entry{key: key, version: s.version})
	return true
}

func (s *snapshot) place(e *entry) {
	if el := s.entries[e.key]; el != nil {
		if el.Value.(*entry).resource == nil {
			s.tombstones--
		}
		s.order.Remove(el)
	}
	if e.resource == nil {
		s.tombstones++
	}
	s.entries[e.key] = s.order.PushBack(e)
}

// get returns a resource, nil when there is none.
func (s *snapshot) get(key string) *api.Resource {
	if el := s.entries[key]; el != nil {
		return el.Value.(*entry).resource
	}
	return nil
}

// changes is what leads from one version to the newest.
type changes struct {
	version uint64
	upsert  []*api.Resource
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
		if e := el.Value.(*entry); e.resource != nil {
			c.upsert = append(c.upsert, e.resource)
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
		if e.resource != nil && (epoch != s.epoch || known[e.key] != e.version) {
			c.upsert = append(c.upsert, e.resource)
		}
	}
	for key := range known {
		if s.get(key) == nil {
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
		if e.resource == nil {
			s.order.Remove(el)
			delete(s.entries, e.key)
			s.tombstones--
			s.forgotten = e.version
		}
		el = next
	}
}
