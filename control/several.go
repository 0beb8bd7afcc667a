package control

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/store"
	"google.golang.org/grpc"
)

// several is a control among those on one store. All of them serve; each has the streams
// of some hosts, speaks for those in the store, and hears there what the others store.
type several struct {
	id      string // of this process
	address string // where the others reach this one; "" nowhere

	mu       sync.Mutex
	revision int64 // of the store, that the model has been brought to
	begun    uint64
	ended    uint64        // looks at the store
	looked   chan struct{} // closed and replaced at the end of each
	others   map[string]*other
	beaten   time.Time     // when the store last took this one's sign of life
	cut      bool          // from the store, which others reach
	turned   chan struct{} // closed and replaced when cut changes
	ask      chan struct{} // capacity 1: look now
}

// other is another control on the store.
type other struct {
	store.Replica
	grew time.Time // when its beat was last seen to grow, by the clock of this one
	conn *grpc.ClientConn
}

// hearEvery is how often the store is asked what others have changed.
const hearEvery = 200 * time.Millisecond

func newSeveral(address string) *several {
	var random [8]byte
	rand.Read(random[:]) // never fails (crypto/rand)
	return &several{
		id: "control-" + hex.EncodeToString(random[:]), address: address, others: map[string]*other{}, beaten: time.Now(),
		looked: make(chan struct{}), turned: make(chan struct{}), ask: make(chan struct{}, 1),
	}
}

// hear brings the model to what others store, until ctx ends. It fails when that is no
// longer known, since this control was away for too long.
func (c *Control) hear(ctx context.Context) error {
	t := time.NewTicker(hearEvery)
	defer t.Stop()
	away := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-c.several.ask:
		}
		err := c.lookAtStore(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, store.ErrForgotten):
			return err
		case err != nil && !away:
			c.log.Warn("what other controls change is not heard", "err", err)
		case err == nil && away:
			c.log.Info("what other controls change is heard again")
			c.behind.again()
		}
		away = err != nil
	}
}

// lookAtStore asks once.
func (c *Control) lookAtStore(ctx context.Context) error {
	s := c.several
	s.mu.Lock()
	s.begun++
	n, after := s.begun, s.revision
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	began := time.Now()
	revision, err := c.hearSince(ctx, after)
	if err == nil {
		c.model.heardOthers(began)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.revision = revision
	}
	s.ended = n
	close(s.looked)
	s.looked = make(chan struct{})
	return err
}

// caughtUp bounds how long a call waits for what another control was told before it.
const caughtUp = 2 * time.Second

// catchUp waits until everything has been heard that was stored before it was called, or for
// caughtUp. Who calls need not be known, so this costs no query of its own.
func (c *Control) catchUp(ctx context.Context) {
	s := c.several
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, caughtUp)
	defer cancel()
	s.mu.Lock()
	want := s.begun + 1
	s.mu.Unlock()
	select {
	case s.ask <- struct{}{}:
	default:
	}
	for {
		s.mu.Lock()
		done, looked := s.ended >= want, s.looked
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-looked:
		}
	}
}

// heardTo returns the revision that the model has been brought to; 0 when there is one control.
func (s *several) heardTo() int64 {
	if s == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

// live shows the others that this control lives, and looks whether they do, until ctx ends.
func (c *Control) live(ctx context.Context) error {
	t := time.NewTicker(c.cfg.takeover / 5)
	defer t.Stop()
	away := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		err := c.beat(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !away {
			c.log.Warn("the store does not hear that this control lives", "err", err)
		}
		away = err != nil
		c.judge(ctx)
		if err := c.sameMesh(ctx); err != nil && !away && ctx.Err() == nil {
			c.log.Warn("the store was not told this mesh's roots", "err", err)
		}
	}
}

// beat shows life and takes note of the others'.
func (c *Control) beat(ctx context.Context) error {
	s := c.several
	ctx, cancel := context.WithTimeout(ctx, c.cfg.takeover/2)
	defer cancel()
	asked := time.Now()
	if err := c.store.Beat(ctx, s.address); err != nil {
		return err
	}
	list, err := c.store.ListReplicas(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	s.mu.Lock()
	// While nobody could beat, or this one could not look, nothing is proved.
	proves := now.Sub(asked) < c.cfg.takeover/4 && now.Sub(s.beaten) < c.cfg.takeover/2
	s.beaten = now
	s.mu.Unlock()
	dead := map[string]bool{}
	for _, gone := range s.note(list, c.model.speakers(), now, proves, c.cfg.takeover, dead) {
		// Its hosts have been elsewhere for long.
		if err := c.store.RemoveReplica(ctx, gone.ID, gone.Beat); err != nil {
			return err
		}
		c.model.forget(gone.ID)
	}
	for id := range c.model.setDead(dead) {
		c.log.Info("another control shows no life; its hosts are expected elsewhere", "control", id)
	}
	return nil
}

// forgetReplicas is after how many times takeover a control that shows no life is forgotten.
const forgetReplicas = 10

// note keeps what the store says of the others, and which of them are said to have hosts. It
// fills in who is dead, and returns who has been for long.
func (s *several) note(list []store.Replica, speakers map[string]bool, now time.Time, proves bool, takeover time.Duration, dead map[string]bool) (gone []store.Replica) {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := map[string]bool{}
	for _, r := range list {
		there[r.ID] = true
		if r.ID == s.id {
			continue
		}
		o := s.others[r.ID]
		if o == nil {
			o = &other{}
			s.others[r.ID] = o
		}
		if o.Beat != r.Beat || !proves {
			o.grew = now
		}
		if o.conn != nil && o.Address != r.Address {
			o.conn.Close() // it only lets go
			o.conn = nil
		}
		o.Replica = r
		switch still := now.Sub(o.grew); {
		case still >= forgetReplicas*takeover:
			gone = append(gone, r)
			fallthrough
		case still >= takeover:
			dead[r.ID] = true
		}
	}
	for id := range speakers {
		if there[id] {
			continue
		}
		// It was forgotten, or this one has not seen it yet.
		there[id] = true
		o := s.others[id]
		if o == nil {
			o = &other{}
			s.others[id] = o
		}
		if o.grew.IsZero() || !proves {
			o.grew = now
		}
		if o.Replica = (store.Replica{}); now.Sub(o.grew) >= takeover {
			dead[id] = true
		}
	}
	for id, o := range s.others {
		if !there[id] {
			if o.conn != nil {
				o.conn.Close()
			}
			delete(s.others, id)
		}
	}
	return gone
}

// judge finds out whether this control alone has lost the store. If the others have not, they
// go on without it and will take its hosts for away: so it lets them go, and comes back when
// it reaches the store. If nobody reaches the store nobody goes on, and each serves what it
// knows.
func (c *Control) judge(ctx context.Context) {
	s := c.several
	s.mu.Lock()
	silent, was := time.Since(s.beaten) > c.cfg.takeover/2, s.cut
	s.mu.Unlock()
	now := silent && (was || c.othersReachStore(ctx))
	if was && !silent {
		c.catchUp(ctx)
	}
	if now == was {
		return
	}
	s.mu.Lock()
	s.cut = now
	close(s.turned)
	s.turned = make(chan struct{})
	s.mu.Unlock()
	if now {
		c.log.Error("this control has lost the store and others have not: its hosts are left to them")
	} else {
		c.log.Info("this control reaches the store again, and serves")
	}
}

// cutOff reports whether this control has lost a store that others reach.
func (s *several) cutOff() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut
}

// first reports whether this control does what one of them should do, and any of them may: the
// first by name that lives.
func (s *several) first(takeover time.Duration) bool {
	if s == nil {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, o := range s.others {
		if id < s.id && time.Since(o.grew) < takeover {
			return false
		}
	}
	return true
}

// until waits until cutOff is want, or ctx ends.
func (s *several) until(ctx context.Context, want bool) {
	for {
		s.mu.Lock()
		is, turned := s.cut == want, s.turned
		s.mu.Unlock()
		if is {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-turned:
		}
	}
}

// serveWhileWell serves at l until ctx ends, but for when this control is cut off: then nobody
// gets a connection.
func (c *Control) serveWhileWell(ctx context.Context, l net.Listener, serve func(context.Context, net.Listener) error) error {
	address := l.Addr().String()
	for {
		well, cut := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			c.several.until(well, true)
			cut()
		}()
		err := serve(well, l)
		cut()
		<-watched
		if ctx.Err() != nil || err != nil {
			return err
		}
		if c.several.until(ctx, false); ctx.Err() != nil {
			return nil
		}
		if l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address); err != nil {
			return &assay.Error{Kind: assay.Conflict, Op: "listen on " + address + " again", Err: err}
		}
	}
}

// end tells the others that this control has ended.
func (c *Control) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s := c.several
	s.mu.Lock()
	for _, o := range s.others {
		if o.conn != nil {
			o.conn.Close()
			o.conn = nil
		}
	}
	s.mu.Unlock()
	if err := c.store.RemoveReplica(ctx, s.id, 0); err != nil && assay.KindOf(err) != assay.Unavailable {
		return err
	}
	return nil
}
