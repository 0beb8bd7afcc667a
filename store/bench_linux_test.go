package store

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// BenchmarkWrite is one durable write; with many writers it is what they get
// together. The server of the tests does not wait for its disk.
func BenchmarkWrite(b *testing.B) {
	for _, writers := range []int{1, 16} {
		b.Run(fmt.Sprintf("sqlite/writers=%d", writers), func(b *testing.B) {
			benchmarkWrite(b, filepath.Join(b.TempDir(), "state.db"), writers)
		})
		b.Run(fmt.Sprintf("postgresql/writers=%d", writers), func(b *testing.B) {
			benchmarkWrite(b, sharedPostgres(b).newDatabase(b), writers)
		})
	}
}

func benchmarkWrite(b *testing.B, url string, writers int) {
	db := openTest(b, url)
	var serial atomic.Int64
	b.SetParallelism(writers)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c := Certificate{Serial: fmt.Sprintf("%032x", serial.Add(1)), Subject: "spiffe://bank.test/ns/bank/sa/web", NotAfter: day}
			if err := db.InsertCertificates(b.Context(), c); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
