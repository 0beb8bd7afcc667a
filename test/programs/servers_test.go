package programs

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func TestServers(t *testing.T) {
	run(t, []scenario{
		{"smtp", []string{"smtpd", "swaks"}, testSMTP},
		{"ssh", []string{"sshd", "ssh", "ssh-keygen"}, testSSH},
	})
}

// serveHTTP serves on a port of the host until the test ends.
func serveHTTP(t *testing.T, s *lab.Workload, port int, h http.Handler) {
	server := &http.Server{Handler: h}
	l := s.Listen(t, port)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
}

// testSMTP: OpenSMTPD speaks first, and writes the client's address into the mail.
func testSMTP(t *testing.T, w *lab.World) {
	w.Dir(t, "/tmp/smtp/mail", "mail")
	w.Dir(t, "/var/spool/smtpd", "")
	w.MustExec(t, "chmod", "0711", "/var/spool/smtpd")
	conf := w.Write(t, "/tmp/smtp/smtpd.conf", `
listen on 0.0.0.0 port 2525 hostname mx.test
listen on :: port 2525 hostname mx.test
table users { "@" = mail }
action "keep" maildir "/tmp/smtp/mail" virtual <users>
match from any for domain "lab.test" action "keep"
`)
	w.Workload(t, "mx", lab.Spec{Ports: []int{2525}, Command: []string{"smtpd", "-d", "-f", conf}})
	client := w.Workload(t, "mailer", lab.Spec{})
	w.AwaitService(t, client, "mx", 2525)
	out := client.MustExec(t, "swaks", "--server", "mx", "--port", "2525", "--ehlo", "mailer.test",
		"--from", "a@other.test", "--to", "b@lab.test", "--header", "Subject: through the mesh", "--timeout", "20")
	if !strings.Contains(out, "220 mx.test ESMTP") {
		t.Errorf("no greeting from OpenSMTPD:\n%s", out)
	}
	lab.Eventually(t, 20*time.Second, "the mail is delivered", func() error {
		mails, _ := filepath.Glob(w.Path("/tmp/smtp/mail/new/*"))
		if len(mails) == 0 {
			return errors.New("no mail yet")
		}
		mail, err := os.ReadFile(mails[0])
		text := string(mail)
		if err != nil || !strings.Contains(text, "through the mesh") {
			return fmt.Errorf("another mail: %s (%v)", text, err)
		}
		if !strings.Contains(text, "["+client.IPv4.String()+"]") && !strings.Contains(strings.ToLower(text), client.IPv6.String()) {
			t.Errorf("the server did not see the client's address:\n%s", text)
		}
		return nil
	})
	// A relay for others it is not: the refusal is the server's own.
	r := client.Exec(t, "swaks", "--server", "mx", "--port", "2525", "--to", "b@elsewhere.test", "--timeout", "20")
	if !strings.Contains(r.Stdout, "550") {
		t.Errorf("relaying was not refused by the server:\n%s", r.Stdout)
	}
}

// testSSH: both sides speak first; the session's environment tells the addresses.
func testSSH(t *testing.T, w *lab.World) {
	dir := w.Dir(t, "/tmp/ssh", "")
	w.Dir(t, "/run/sshd", "")
	w.MustExec(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/host")
	w.MustExec(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/user")
	conf := w.Write(t, dir+"/sshd_config", `
Port 2222
HostKey /tmp/ssh/host
AuthorizedKeysFile /tmp/ssh/user.pub
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
`)
	sshd := "/usr/sbin/sshd" // it insists on an absolute path
	server := w.Workload(t, "shell", lab.Spec{Ports: []int{2222}, Command: []string{sshd, "-D", "-e", "-f", conf}})
	client := w.Workload(t, "operator", lab.Spec{})
	w.AwaitService(t, client, "shell", 2222)
	ssh := []string{"ssh", "-p", "2222", "-i", dir + "/user", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
		"-o", "UserKnownHostsFile=" + dir + "/known", "-o", "ConnectTimeout=15"}
	for flag, addrs := range map[string][2]string{
		"-4": {client.IPv4.String(), server.IPv4.String()},
		"-6": {client.IPv6.String(), server.IPv6.String()},
	} {
		out := client.MustExec(t, append(ssh, flag, "root@shell", "echo $SSH_CONNECTION")...)
		f := strings.Fields(out)
		if len(f) != 4 || f[0] != addrs[0] || f[2] != addrs[1] || f[3] != "2222" {
			t.Errorf("%s: SSH_CONNECTION = %q, want from %s to %s port 2222", flag, out, addrs[0], addrs[1])
		}
	}
	// A binary stream in both directions with half-close: cat ends when ssh's input does.
	body := strings.Repeat("\x00\xff binary\n", 1<<16)
	r := client.ExecInput(t, body, append(ssh, "root@shell", "cat")...)
	if r.Code != 0 || r.Stdout != body {
		t.Errorf("cat through ssh: %d bytes of %d came back, exit code %d %s", len(r.Stdout), len(body), r.Code, r.Stderr)
	}
	if r := client.Exec(t, append(ssh, "root@shell", "exit 7")...); r.Code != 7 {
		t.Errorf("exit code through ssh is %d, want 7", r.Code)
	}
}
