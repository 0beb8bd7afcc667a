package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

// TestControlAndToken runs control as a person does and makes a token.
func TestControlAndToken(t *testing.T) {
	dir := t.TempDir()
	socket, data := filepath.Join(dir, "s"), filepath.Join(dir, "data")
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	done := make(chan int)
	go func() {
		done <- run(ctx, []string{"control", "--data", data, "--socket", socket, "--listen", "127.0.0.1:0", "--trust-domain", "bank.test"}, strings.NewReader(""), &log, &log)
	}()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no socket")
		}
		time.Sleep(5 * time.Millisecond)
	}
	command := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(t.Context(), args, strings.NewReader(""), &out, &errs)
		return code, out.String(), errs.String()
	}
	code, out, errs := command("token", "create", "--control", socket, "--cover", "bank/*", "--cover", "shop/web")
	if _, err := assay.ParseJoinToken(out); code != 0 || err != nil || !strings.Contains(errs, "expires at") {
		t.Errorf("token create: %d %q %q, %v", code, out, errs, err)
	}
	code, out, _ = command("token", "create", "--control", socket, "--cover", "bank/*", "-o", "json")
	var doc struct{ Token string }
	if err := json.Unmarshal([]byte(out), &doc); code != 0 || err != nil || doc.Token == "" {
		t.Errorf("token create -o json: %d %q, %v", code, out, err)
	}
	if code, _, errs := command("token", "create", "--control", socket); code != 1 || !strings.Contains(errs, "NAMESPACE/SERVICE") {
		t.Errorf("without a pattern: %d %q", code, errs)
	}
	if code, _, errs := command("token", "create", "--control", filepath.Join(dir, "none"), "--cover", "a/b"); code != 1 || !strings.Contains(errs, "start control: assay up") {
		t.Errorf("without control: %d %q", code, errs)
	}
	if code, _, errs := command("control", "--data", data, "--socket", socket+"2", "--listen", "127.0.0.1:0"); code != 1 || !strings.Contains(errs, "is the control of it") {
		t.Errorf("a second control: %d %q", code, errs)
	}
	if code, _, errs := command("control", "--data", filepath.Join(dir, "other"), "--socket", socket, "--listen", "127.0.0.1:0"); code != 1 || !strings.Contains(errs, "somebody listens on it") {
		t.Errorf("a second socket: %d %q", code, errs)
	}
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("control ended with %d:\n%s", code, log.Bytes())
	}
	if code, _, errs := command("control", "--data", data, "--socket", socket, "--listen", "127.0.0.1:0", "--trust-domain", "other.test"); code != 1 || !strings.Contains(errs, "trust domain") {
		t.Errorf("another trust domain: %d %q", code, errs)
	}
}

// TestInjectorFlags: what cannot be meant is refused before anything starts.
func TestInjectorFlags(t *testing.T) {
	for want, args := range map[string][]string{
		"is for --kubernetes":  {"--injector-image", "a"},
		"want Always":          {"--kubernetes", "--injector-image", "a", "--injector-pull-policy", "Sometimes"},
		"or 0 for none":        {"--kubernetes", "--injector-image", "a", "--injector-metrics-port", "70000"},
		"without a name":       {"--kubernetes", "--injector-image", "a", "--injector-pull-secret", "b,"},
		"name the address of":  {"--kubernetes", "--injector-image", "a", "--injector-control", "10.96.0.7"},
		"missing port in addr": {"--kubernetes", "--injector-image", "a"},
	} {
		var out bytes.Buffer
		code := run(t.Context(), append([]string{"control", "--data", t.TempDir()}, args...), strings.NewReader(""), &out, &out)
		if code != 1 || !strings.Contains(out.String(), want) {
			t.Errorf("%v: exit code %d, want %q: %s", args, code, want, out.String())
		}
	}
}
