package store

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// atExit is run when all tests have ended.
var atExit []func()

func TestMain(m *testing.M) {
	if path := os.Getenv(writerVariable); path != "" {
		writeUntilKilled(path) // see TestSQLiteKilledWriter
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, f := range atExit {
			f()
		}
		os.Exit(code)
	}))
}
