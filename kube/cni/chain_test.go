package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChain(t *testing.T) {
	const ours = `{"agent":"/run/a.sock","type":"assay-cni"}`
	for name, c := range map[string]struct{ in, want string }{
		"a list":             {`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","x":{"y":[1, 2]}},{"type":"portmap"}]}`, `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","x":{"y":[1,2]}},{"type":"portmap"},` + ours + `]}`},
		"a single plugin":    {`{"cniVersion":"0.3.1","name":"n","type":"a","ipam":{}}`, `{"cniVersion":"0.3.1","name":"n","plugins":[{"ipam":{},"type":"a"},` + ours + `]}`},
		"ours in the middle": {`{"name":"n","plugins":[{"type":"a"},` + ours + `,{"type":"b"}]}`, `{"name":"n","plugins":[{"type":"a"},{"type":"b"},` + ours + `]}`},
		"another socket":     {`{"name":"n","plugins":[{"type":"a"},{"type":"assay-cni","agent":"/old"}]}`, `{"name":"n","plugins":[{"type":"a"},` + ours + `]}`},
		"twice":              {`{"name":"n","plugins":[{"type":"a"},` + ours + `,` + ours + `]}`, `{"name":"n","plugins":[{"type":"a"},` + ours + `]}`},
		"fields of others":   {`{"disableCheck":true,"loadOnlyInlinedPlugins":false,"name":"n","plugins":[{"type":"a"}]}`, `{"disableCheck":true,"loadOnlyInlinedPlugins":false,"name":"n","plugins":[{"type":"a"},` + ours + `]}`},
	} {
		out, changed, err := Chain([]byte(c.in), "/run/a.sock")
		if err != nil || !changed || compact(string(out)) != c.want {
			t.Errorf("%s: %s %v %v\nwant %s", name, compact(string(out)), changed, err, c.want)
		}
		again, changed, err := Chain(out, "/run/a.sock")
		if err != nil || changed || string(again) != string(out) {
			t.Errorf("%s, again: %s %v %v", name, again, changed, err)
		}
		back, changed, err := Unchain(out)
		if err != nil || !changed || strings.Contains(string(back), Type) {
			t.Errorf("%s, taken out: %s %v %v", name, back, changed, err)
		}
		if _, changed, err := Unchain(back); changed || err != nil {
			t.Errorf("%s, taken out again: %v %v", name, changed, err)
		}
	}
	for _, bad := range []string{``, `[]`, `{}`, `{"name":"n"}`, `{"plugins":{}}`, `{"plugins":[]}`, `{"plugins":[` + ours + `]}`, `{"name":"n","plugins":[{"type":"a"}]`} {
		if out, _, err := Chain([]byte(bad), "/run/a.sock"); err == nil {
			t.Errorf("%q became %s", bad, out)
		}
	}
}

// compact undoes the indentation that a person reads.
func compact(s string) string {
	n, err := parse([]byte(s))
	if err != nil {
		return err.Error()
	}
	var fields []string
	for _, key := range []string{"cniVersion", "disableCheck", "loadOnlyInlinedPlugins", "name"} {
		if v, ok := n.fields[key]; ok {
			fields = append(fields, `"`+key+`":`+string(v))
		}
	}
	var plugins []string
	for _, p := range n.plugins {
		plugins = append(plugins, string(p))
	}
	return "{" + strings.Join(append(fields, `"plugins":[`+strings.Join(plugins, ",")+"]"), ",") + "}"
}

// TestFolder: a runtime reads the first file that it can; that one is chained, whatever
// its form, and everything is as it was afterwards.
func TestFolder(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := install(dir, "/a"); err == nil || !strings.Contains(err.Error(), "no network configuration") {
		t.Errorf("an empty folder: %v", err)
	}
	const single, list = `{"cniVersion":"1.0.0","name":"n","type":"a"}`, `{"cniVersion":"1.0.0","name":"m","plugins":[{"type":"b"}]}`
	put("00-broken.conflist", "{")
	put("10-n.conf", single)
	put("20-m.conflist", list)
	put("README", "not a configuration")
	file, changed, err := install(dir, "/a")
	if file != "10-n.conflist" || !changed || err != nil {
		t.Fatalf("%s %v %v", file, changed, err)
	}
	if file, changed, err := install(dir, "/a"); file != "10-n.conflist" || changed || err != nil {
		t.Errorf("again: %s %v %v", file, changed, err)
	}
	if files, err := Ours(dir); len(files) != 1 || files[0] != file || err != nil {
		t.Errorf("ours are %v %v", files, err)
	}
	// The network's own plugin comes back with its form.
	put("10-n.conf", strings.Replace(single, `"a"`, `"c"`, 1))
	if file, changed, err := install(dir, "/a"); file != "10-n.conflist" || !changed || err != nil {
		t.Errorf("written anew: %s %v %v", file, changed, err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "10-n.conflist")); !strings.Contains(string(b), `"c"`) {
		t.Errorf("the newer one is not there: %s", b)
	}
	if err := Remove(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "00-broken.conflist 10-n.conf 20-m.conflist README" {
		t.Errorf("afterwards there are %s", got)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "10-n.conf")); string(b) != strings.Replace(single, `"a"`, `"c"`, 1) {
		t.Errorf("afterwards it is %s", b)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "20-m.conflist")); string(b) != list {
		t.Errorf("one that was not ours is %s", b)
	}
}
