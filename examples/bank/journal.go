package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

// Journal is the ledger's book: entries in order, in memory and, when it has a
// file, on disk before anybody is told that they are booked.
//
// Bookings that arrive while the disk is busy share the next write and sync.
type Journal struct {
	mu       sync.RWMutex
	entries  []Entry          // entries[i].Seq == i+1
	byKey    map[string]int64 // idempotency key -> sequence number
	balance  map[string]int64
	accounts map[string][]int64 // account -> its sequence numbers

	file    *os.File
	saveMu  sync.Mutex // held by whoever writes
	pending []byte     // lines that wait for it, guarded by mu
	failed  error      // the disk's first error: nothing is booked after it
}

// OpenJournal reads the file, or begins an empty journal. "" keeps it in memory.
// A last line that was cut short by a crash was never confirmed and is dropped.
func OpenJournal(path string) (*Journal, error) {
	j := &Journal{byKey: map[string]int64{}, balance: map[string]int64{}, accounts: map[string][]int64{}}
	if path == "" {
		return j, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := j.load(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	j.file = f
	return j, nil
}

func (j *Journal) load(f *os.File) error {
	var good int64
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("entry %d: %w", len(j.entries)+1, err)
		}
		if e.Seq != int64(len(j.entries))+1 {
			return fmt.Errorf("entry %d follows entry %d", e.Seq, len(j.entries))
		}
		j.add(e)
		good += int64(len(line))
	}
	if err := f.Truncate(good); err != nil {
		return err
	}
	_, err := f.Seek(good, io.SeekStart)
	return err
}

// add takes an entry into the books. The caller holds mu.
func (j *Journal) add(e Entry) {
	j.entries = append(j.entries, e)
	j.byKey[e.Key] = e.Seq
	j.balance[e.From] -= e.Amount
	j.balance[e.To] += e.Amount
	j.accounts[e.From] = append(j.accounts[e.From], e.Seq)
	j.accounts[e.To] = append(j.accounts[e.To], e.Seq)
}

// Book appends e. A repeated key returns the entry that was booked first and
// false; with other content it is refused.
func (j *Journal) Book(e Entry, now time.Time) (Entry, bool, error) {
	if err := e.Check(); err != nil {
		return Entry{}, false, refuse(http.StatusBadRequest, "%v", err)
	}
	j.mu.Lock()
	if j.failed != nil {
		defer j.mu.Unlock()
		return Entry{}, false, j.failed
	}
	if seq, ok := j.byKey[e.Key]; ok {
		old := j.entries[seq-1]
		j.mu.Unlock()
		if !old.same(&e) {
			return Entry{}, false, refuse(http.StatusConflict, "key %s was used for another transfer", e.Key)
		}
		return old, false, j.save() // the first booking may still be on its way to the disk
	}
	if e.From != ownAccount && j.balance[e.From] < e.Amount {
		defer j.mu.Unlock()
		return Entry{}, false, refuse(http.StatusUnprocessableEntity, "account %s holds less than %s", e.From, money(e.Amount))
	}
	e.Seq, e.Time = int64(len(j.entries))+1, now.UTC()
	j.add(e)
	if j.file != nil {
		line, err := json.Marshal(e)
		if err != nil {
			panic(err) // an Entry always marshals
		}
		j.pending = append(append(j.pending, line...), '\n')
	}
	j.mu.Unlock()
	return e, true, j.save()
}

// save returns when everything booked so far is on disk. Whoever gets saveMu
// writes for all who wait behind it.
func (j *Journal) save() error {
	if j.file == nil {
		return nil
	}
	j.saveMu.Lock()
	defer j.saveMu.Unlock()
	j.mu.Lock()
	b, failed := j.pending, j.failed
	j.pending = nil
	j.mu.Unlock()
	if failed != nil || len(b) == 0 {
		return failed
	}
	_, err := j.file.Write(b)
	if err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		// Memory is ahead of the disk now; only a restart, which reads the disk, is safe.
		j.mu.Lock()
		j.failed = fmt.Errorf("journal: %w", err)
		j.mu.Unlock()
	}
	return err
}

// Balance returns an account's balance and how many entries made it.
func (j *Journal) Balance(account string) (minor int64, entries int) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	return j.balance[account], len(j.accounts[account])
}

// Entries returns an account's entries after a sequence number, n at most.
func (j *Journal) Entries(account string, after int64, n int) []Entry {
	j.mu.RLock()
	defer j.mu.RUnlock()
	var list []Entry
	for _, seq := range j.accounts[account] {
		if seq > after {
			if list = append(list, j.entries[seq-1]); len(list) == n {
				break
			}
		}
	}
	return list
}

// Booked reports whether a key is in the books.
func (j *Journal) Booked(key string) bool {
	j.mu.RLock()
	defer j.mu.RUnlock()
	return j.byKey[key] != 0
}

// Totals returns the number of entries and the sum of all balances, which is zero
// or the ledger is wrong.
func (j *Journal) Totals() (entries int, sum int64) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	for _, b := range j.balance {
		sum += b
	}
	return len(j.entries), sum
}

// Close writes what is pending and closes the file.
func (j *Journal) Close() error {
	if j.file == nil {
		return nil
	}
	return errors.Join(j.save(), j.file.Close())
}

// encode writes entries as JSON lines.
func encode(list []Entry) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for i := range list {
		enc.Encode(&list[i]) // to memory
	}
	return b.Bytes()
}
