package store

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
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

// BenchmarkPruneCertificates takes batches out of an inventory of a million, whose serial numbers
// are random. Its other number is the longest that a batch, and so another writer of SQLite, took.
func BenchmarkPruneCertificates(b *testing.B) {
	b.Run("sqlite", func(b *testing.B) {
		benchmarkPrune(b, filepath.Join(b.TempDir(), "state.db"), `lower(hex(randomblob(16)))`)
	})
	b.Run("postgresql", func(b *testing.B) {
		benchmarkPrune(b, sharedPostgres(b).newDatabase(b), `md5(random()::text)`)
	})
}

func benchmarkPrune(b *testing.B, url, random string) {
	db := openTest(b, url)
	must(db.w.ExecContext(b.Context(), `INSERT INTO certificate (serial, subject, workload, host, artifacts, issuer, notbefore, notafter, issued)
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
		SELECT `+random+`, 'spiffe://bank.test/ns/bank/sa/web', `+random+`, 'node-0123456789abcdef', $1, $2, i, i, i FROM n`,
		string(assay.DigestOf(nil)), "0123456789abcdef0123456789abcdef"))(b)
	var longest time.Duration
	for b.Loop() {
		began := time.Now()
		n, err := db.PruneCertificates(b.Context(), time.UnixMicro(1_000_001))
		if err != nil || n != PruneBatch {
			b.Fatalf("%d, %v", n, err)
		}
		longest = max(longest, time.Since(began))
	}
	b.ReportMetric(float64(longest.Milliseconds()), "ms/longest")
}
