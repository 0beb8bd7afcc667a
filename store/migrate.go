package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"assay.dev"
)

// Migrations are numbered from 1 without gaps and only ever added. Each runs in one
// transaction together with the new version number. Statements end with a
// semicolon at the end of a line. {{bytes}} and {{text}} stand for the engine's
// types; a column of {{text}} orders bytewise.
//
//go:embed migrations/*.sql
var migrations embed.FS

// Schema is the newest version of the schema that this build knows.
const Schema = 2

// migrate brings the schema up to date, or refuses one that is newer than this
// build: running on would lose what the newer columns mean. Several processes may
// do so at once; the version is read again inside each transaction.
func (db *DB) migrate(ctx context.Context) error {
	op := "open store " + db.name
	version, err := db.schemaVersion(ctx, op)
	if err != nil {
		return err
	}
	for version < Schema {
		step := version + 1
		script, err := migrationScript(step)
		if err != nil {
			return fail(assay.Internal, op, err, "")
		}
		err = db.transact(ctx, fmt.Sprintf("%s: bring schema to version %d", op, step), "", func(ctx context.Context, t *tx) error {
			return db.migrateStep(ctx, t, step, script)
		})
		// An existing table means that another process was first, or that the tables
		// are not ours.
		failure := err
		if failure != nil && assay.KindOf(failure) != assay.Conflict {
			return failure
		}
		if version, err = db.schemaVersion(ctx, op); err != nil {
			return err
		}
		if failure != nil && version < step {
			return fail(assay.Conflict, op, failure, "give Assay a database or a schema (search_path) of its own")
		}
	}
	if version > Schema {
		return fail(assay.Conflict, op, fmt.Errorf("its schema is version %d, and this build of assay knows versions up to %d", version, Schema),
			fmt.Sprintf("run a build that knows version %d, or restore the backup from before the upgrade", version))
	}
	return nil
}

func (db *DB) migrateStep(ctx context.Context, t *tx, step int64, script []string) error {
	version, err := t.schemaVersion(ctx)
	if err != nil || version >= step {
		return err
	}
	if version == 0 {
		if _, err := t.exec(ctx, `CREATE TABLE assay_schema (one BIGINT NOT NULL PRIMARY KEY, version BIGINT NOT NULL)`); err != nil {
			return err
		}
	}
	for _, statement := range script {
		if _, err := t.exec(ctx, db.types.Replace(statement)); err != nil {
			return err
		}
	}
	_, err = t.exec(ctx, `INSERT INTO assay_schema (one, version) VALUES (1, $1) ON CONFLICT (one) DO UPDATE SET version = excluded.version`, step)
	return err
}

func (db *DB) schemaVersion(ctx context.Context, op string) (version int64, err error) {
	err = db.read(ctx, op, func(ctx context.Context, t *tx) error {
		version, err = t.schemaVersion(ctx)
		return err
	})
	return version, err
}

// schemaVersion is 0 for an empty database.
func (t *tx) schemaVersion(ctx context.Context) (int64, error) {
	var tables, version int64
	if _, err := t.row(ctx, t.hasTable, []any{"assay_schema"}, &tables); err != nil || tables == 0 {
		return 0, err
	}
	_, err := t.row(ctx, `SELECT version FROM assay_schema WHERE one = 1`, nil, &version)
	return version, err
}

// migrationScript returns the statements of one migration.
func migrationScript(step int64) ([]string, error) {
	names, err := fs.Glob(migrations, fmt.Sprintf("migrations/%04d_*.sql", step))
	if err != nil || len(names) != 1 {
		return nil, errors.Join(err, fmt.Errorf("migration %d: %d files", step, len(names)))
	}
	text, err := migrations.ReadFile(names[0])
	if err != nil {
		return nil, err
	}
	var script []string
	for statement := range strings.SplitSeq(string(text), ";\n") {
		var lines []string
		for line := range strings.Lines(statement) {
			if code, _, _ := strings.Cut(line, "--"); strings.TrimSpace(code) != "" {
				lines = append(lines, strings.TrimRight(code, " \n"))
			}
		}
		if len(lines) > 0 {
			script = append(script, strings.Join(lines, "\n"))
		}
	}
	return script, nil
}
