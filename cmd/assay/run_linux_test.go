package main

import (
	"os/user"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/agent"
)

func TestRunIsCheckedBeforeAnythingIsAsked(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"run"}, "requires at least 1 arg"},
		{[]string{"run", "--", "true"}, `"service" not set`},
		{[]string{"run", "--service", "Web", "--", "true"}, "a-z, 0-9"},
		{[]string{"run", "--service", "web", "--port", "70000", "--", "true"}, "port 70000"},
		{[]string{"run", "--service", "web", "--label", "novalue", "--", "true"}, "KEY=VALUE"},
		{[]string{"run", "--service", "web", "--artifact", "/no/such", "--", "true"}, "no such file"},
		{[]string{"run", "--service", "web", "--socket", "/no/such", "--", "true"}, "start one: assay up"},
	} {
		var errs strings.Builder
		if code := run(t.Context(), c.args, strings.NewReader(""), &errs, &errs); code != 1 || !strings.Contains(errs.String(), c.says) {
			t.Errorf("assay %v: exit code %d, %s", c.args, code, errs.String())
		}
	}
}

func TestRunOptions(t *testing.T) {
	o := runOptions{request: agent.RunRequest{Service: "web", Namespace: "bank", Artifact: "."}, ports: []uint{80, 443}, labels: []string{"tier=front", "a=b=c"}}
	if err := o.complete(); err != nil {
		t.Fatal(err)
	}
	r := o.request
	if len(r.Ports) != 2 || r.Labels["a"] != "b=c" || !strings.HasPrefix(r.Artifact, "/") || o.socket == "" {
		t.Errorf("%+v", o)
	}
	o.request.Account = "not/an/account"
	if err := o.complete(); assay.KindOf(err) != assay.Invalid {
		t.Errorf("account: %v", err)
	}
}

func TestFindUser(t *testing.T) {
	if r, err := findUser("54321:12"); err != nil || r.Uid != 54321 || r.Gid != 12 || len(r.Groups) != 0 {
		t.Errorf("numbers: %+v, %v", r, err)
	}
	if r, err := findUser("54321"); err != nil || r.Uid != 54321 || r.Gid != 54321 {
		t.Errorf("a number: %+v, %v", r, err)
	}
	me, err := user.Current()
	if err != nil {
		t.Skip(err)
	}
	if r, err := findUser(me.Username); err != nil || r.name != me.Username || r.home != me.HomeDir {
		t.Errorf("%s: %+v, %v", me.Username, r, err)
	}
	for _, bad := range []string{"no-such-user-here", "1:no-such-group-here", "", "-1"} {
		if r, err := findUser(bad); err == nil {
			t.Errorf("%q is %+v", bad, r)
		}
	}
}
