package programs

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestDatabases(t *testing.T) {
	run(t, []scenario{
		{"postgresql", []string{"psql", "setpriv", "/usr/lib/postgresql/15/bin/postgres"}, testPostgreSQL},
		{"mariadb", []string{"mariadbd", "mariadb", "mariadb-install-db"}, testMariaDB},
		{"redis", []string{"redis-server", "redis-cli"}, testRedis},
	})
}

// as is the prefix that runs a command as a Debian system user.
func as(user string) []string {
	return []string{"setpriv", "--reuid", user, "--regid", user, "--clear-groups"}
}

// testPostgreSQL: pg_hba.conf names the client's addresses and nobody else's.
func testPostgreSQL(t *testing.T, w *lab.World) {
	const bin = "/usr/lib/postgresql/15/bin/"
	client := w.Workload(t, "ledger", lab.Spec{})
	stranger := w.Workload(t, "stranger", lab.Spec{})
	w.Dir(t, "/tmp/pg", "postgres")
	w.MustExec(t, append(as("postgres"), bin+"initdb", "-D", "/tmp/pg/data", "-A", "reject", "--no-sync", "-E", "UTF8")...)
	w.Write(t, "/tmp/pg/data/pg_hba.conf", fmt.Sprintf("host all postgres %s/32 trust\nhost all postgres %s/128 trust\n", client.IPv4, client.IPv6))
	server := w.Workload(t, "postgres", lab.Spec{Ports: []int{5432}, Command: append(as("postgres"), bin+"postgres", "-D", "/tmp/pg/data",
		"-c", "listen_addresses=*", "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "log_connections=on")})
	w.AwaitService(t, client, "postgres", 5432)
	psql := func(x *lab.Workload, sql string, extra string) lab.Result {
		return x.Exec(t, "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "host=postgres user=postgres dbname=postgres connect_timeout=15 "+extra, "-c", sql)
	}
	lab.Eventually(t, 20*time.Second, "PostgreSQL takes queries", func() error {
		if r := psql(client, "select 1", ""); r.Code != 0 {
			return fmt.Errorf("%s", r.Stderr)
		}
		return nil
	})
	for _, target := range []string{"", "hostaddr=" + server.IPv4.String()} {
		r := psql(client, "select host(inet_client_addr())", target)
		if got := strings.TrimSpace(r.Stdout); got != client.IPv4.String() && got != client.IPv6.String() {
			t.Errorf("%s: the server saw the client as %q, want %s or %s", target, got, client.IPv4, client.IPv6)
		}
	}
	r := psql(client, "create table t as select g as n, repeat('x', 100) as s from generate_series(1, 50000) g; select count(*), sum(length(s)) from t", "")
	if got := strings.TrimSpace(r.Stdout); !strings.HasSuffix(got, "50000|5000000") {
		t.Errorf("query answered %q %s", got, r.Stderr)
	}
	if r := psql(client, "select n, s from t order by n", ""); strings.Count(r.Stdout, "\n") != 50000 {
		t.Errorf("a result of 50000 rows had %d", strings.Count(r.Stdout, "\n"))
	}
	// The server's error for a failed statement, and for a client that it does not know.
	if r := psql(client, "select 1/0", ""); r.Code == 0 || !strings.Contains(r.Stderr, "division by zero") {
		t.Errorf("the server's error did not arrive: %s", r.Stderr)
	}
	if r := psql(stranger, "select 1", ""); r.Code == 0 || !strings.Contains(r.Stderr, "no pg_hba.conf entry for host") {
		t.Errorf("a client that pg_hba.conf does not name: exit code %d, %s", r.Code, r.Stderr)
	}
	// Cancelling uses a second connection that closes without an answer.
	r = client.Exec(t, "sh", "-c", `timeout -s INT 1 psql -X "host=postgres user=postgres dbname=postgres" -c "select pg_sleep(30)"`)
	if r.Took > 10*time.Second || !strings.Contains(r.Stderr, "canceling statement") {
		t.Errorf("cancelling a query took %s: %s", r.Took, r.Stderr)
	}
}

// testMariaDB: the server speaks first and grants by the client's address.
func testMariaDB(t *testing.T, w *lab.World) {
	client := w.Workload(t, "shop", lab.Spec{})
	stranger := w.Workload(t, "shop-stranger", lab.Spec{})
	w.Dir(t, "/tmp/maria", "mysql")
	w.MustExec(t, "mariadb-install-db", "--no-defaults", "--user=mysql", "--datadir=/tmp/maria/data", "--skip-test-db", "--auth-root-authentication-method=socket")
	w.Write(t, "/tmp/maria/init.sql", fmt.Sprintf("create user app@'%s' identified by 'secret';\ncreate user app@'%s' identified by 'secret';\ngrant all on *.* to app@'%s';\ngrant all on *.* to app@'%s';\n",
		client.IPv4, client.IPv6, client.IPv4, client.IPv6))
	w.Workload(t, "maria", lab.Spec{Ports: []int{3306}, Command: []string{"mariadbd", "--no-defaults", "--user=mysql", "--datadir=/tmp/maria/data",
		"--socket=/tmp/maria/sock", "--pid-file=/tmp/maria/pid", "--port=3306", "--bind-address=*", "--skip-name-resolve", "--init-file=/tmp/maria/init.sql",
		"--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M", "--tmpdir=/tmp/maria"}})
	w.AwaitService(t, client, "maria", 3306)
	sql := func(x *lab.Workload, q string) lab.Result {
		return x.Exec(t, "mariadb", "--no-defaults", "-h", "maria", "-P", "3306", "-u", "app", "-psecret", "--connect-timeout=15", "-N", "-B", "-e", q)
	}
	lab.Eventually(t, 30*time.Second, "MariaDB takes queries", func() error {
		if r := sql(client, "select 1"); r.Code != 0 {
			return fmt.Errorf("%s", r.Stderr)
		}
		return nil
	})
	r := sql(client, "select user()")
	if got := strings.TrimSpace(r.Stdout); got != "app@"+client.IPv4.String() && got != "app@"+client.IPv6.String() {
		t.Errorf("the server saw %q, want app@%s", got, client.IPv4)
	}
	if r := sql(client, "select repeat('y', 3000000)"); len(strings.TrimSpace(r.Stdout)) != 3000000 {
		t.Errorf("a large value has %d bytes: %s", len(r.Stdout), r.Stderr)
	}
	if r := sql(stranger, "select 1"); r.Code == 0 || !strings.Contains(r.Stderr, "is not allowed to connect") && !strings.Contains(r.Stderr, "Access denied") {
		t.Errorf("a client without a grant: exit code %d, %s", r.Code, r.Stderr)
	}
}

// testRedis: protected mode answers only clients on loopback, until there is a password.
func testRedis(t *testing.T, w *lab.World) {
	for _, c := range []struct{ name, password, want string }{
		{"cache", "", "DENIED"},
		{"cache-pw", "secret", "PONG"},
	} {
		command := []string{"redis-server", "--port", "6379", "--bind", "*", "-::*", "--protected-mode", "yes", "--save", "", "--dir", "/tmp"}
		cli := []string{"redis-cli", "-h", c.name, "-p", "6379"}
		local := []string{"redis-cli", "-h", "127.0.0.1", "-p", "6379"}
		if c.password != "" {
			command = append(command, "--requirepass", c.password)
			cli = append(cli, "--no-auth-warning", "-a", c.password)
			local = append(local, "--no-auth-warning", "-a", c.password)
		}
		server := w.Workload(t, c.name, lab.Spec{Ports: []int{6379}, Command: command})
		client := w.Workload(t, c.name+"-user", lab.Spec{})
		w.AwaitService(t, client, c.name, 6379)
		if r := client.Exec(t, append(cli, "PING")...); !strings.Contains(r.Stdout+r.Stderr, c.want) {
			t.Errorf("%s: PING answered %q %q, want %s", c.name, r.Stdout, r.Stderr, c.want)
		}
		if r := server.Exec(t, append(local, "PING")...); !strings.Contains(r.Stdout, "PONG") {
			t.Errorf("%s: PING on loopback answered %q %q", c.name, r.Stdout, r.Stderr)
		}
		if c.password == "" {
			continue
		}
		value := strings.Repeat("v", 1<<20)
		client.ExecInput(t, value, append(cli, "-x", "SET", "k")...)
		if r := client.Exec(t, append(cli, "GET", "k")...); strings.TrimSpace(r.Stdout) != value {
			t.Errorf("a value of 1 MiB came back with %d bytes", len(r.Stdout))
		}
		list := client.MustExec(t, append(cli, "CLIENT", "LIST")...)
		if !strings.Contains(list, "addr="+client.IPv4.String()+":") && !strings.Contains(list, "addr=["+client.IPv6.String()+"]:") {
			t.Errorf("the server does not see the client's address: %s", list)
		}
		// Pipelining: 10,000 commands in one go.
		r := client.ExecInput(t, strings.Repeat("INCR n\r\n", 10000), append(cli, "--pipe")...)
		if !strings.Contains(r.Stdout, "replies: 10000") {
			t.Errorf("pipelining: %s %s", r.Stdout, r.Stderr)
		}
	}
}
