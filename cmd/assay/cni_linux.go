package main

import (
	"context"
	"path/filepath"

	"assay.dev/agent"
	"assay.dev/kube/cni"
)

// pluginMain is the whole process when it is executed as a network plugin: a container
// runtime knows one by the name of its file.
func pluginMain(name string) bool {
	if filepath.Base(name) != cni.Type {
		return false
	}
	cni.Main(func(path string) cni.Agent { return sandboxes{agent.Sandboxes{Socket: path}} })
	return true
}

// sandboxes turns what the plugin says into what the agent hears.
type sandboxes struct{ agent agent.Sandboxes }

func (s sandboxes) Add(ctx context.Context, x cni.Sandbox) error {
	return s.agent.Add(ctx, agent.Sandbox(x))
}

func (s sandboxes) Check(ctx context.Context, x cni.Sandbox) error {
	return s.agent.Check(ctx, agent.Sandbox(x))
}

func (s sandboxes) Del(ctx context.Context, x cni.Sandbox) error {
	return s.agent.Del(ctx, agent.Sandbox(x))
}

func (s sandboxes) Ready(ctx context.Context) error { return s.agent.Ready(ctx) }
