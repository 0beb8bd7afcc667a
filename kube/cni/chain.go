package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// Chain returns a network configuration (.conf or .conflist) as a list with the plugin
// at its end. changed is false when it says so already; then out is in.
func Chain(in []byte, agent string) (out []byte, changed bool, err error) {
	n, err := parse(in)
	if err != nil {
		return nil, false, err
	}
	entry, err := json.Marshal(map[string]string{"type": Type, "agent": agent})
	if err != nil {
		return nil, false, err
	}
	if last := len(n.plugins) - 1; n.isList && last > 0 && bytes.Equal(n.plugins[last], entry) && n.count() == 1 {
		return in, false, nil
	}
	n.drop()
	if len(n.plugins) == 0 {
		return nil, false, errors.New("it has no plugin that makes a network")
	}
	n.plugins = append(n.plugins, entry)
	out, err = n.list()
	return out, true, err
}

// Unchain returns a network configuration without the plugin.
func Unchain(in []byte) (out []byte, changed bool, err error) {
	n, err := parse(in)
	if err != nil || n.count() == 0 {
		return in, false, err
	}
	n.drop()
	out, err = n.list()
	return out, true, err
}

// network is a configuration of which only the list of plugins is understood.
type network struct {
	isList  bool
	fields  map[string]json.RawMessage // but the plugins
	plugins []json.RawMessage
}

func parse(in []byte) (*network, error) {
	n := &network{}
	if err := json.Unmarshal(in, &n.fields); err != nil {
		return nil, fmt.Errorf("not a network configuration: %w", err)
	}
	if raw, ok := n.fields["plugins"]; ok {
		n.isList = true
		delete(n.fields, "plugins")
		if err := json.Unmarshal(raw, &n.plugins); err != nil {
			return nil, fmt.Errorf("plugins: %w", err)
		}
		for i := range n.plugins { // one form, to compare with
			var b bytes.Buffer
			if err := json.Compact(&b, n.plugins[i]); err != nil {
				return nil, fmt.Errorf("plugins: %w", err)
			}
			n.plugins[i] = b.Bytes()
		}
		return n, nil
	}
	if typeOf(in) == "" {
		return nil, errors.New("not a network configuration: it has neither plugins nor a type")
	}
	// A single plugin becomes a list of one, which has the name and the version.
	single := n.fields
	n.fields = map[string]json.RawMessage{}
	for _, key := range []string{"cniVersion", "name"} {
		if v, ok := single[key]; ok {
			n.fields[key] = v
			delete(single, key)
		}
	}
	b, err := json.Marshal(single)
	n.plugins = []json.RawMessage{b}
	return n, err
}

func typeOf(plugin json.RawMessage) string {
	var p struct {
		Type string `json:"type"`
	}
	json.Unmarshal(plugin, &p)
	return p.Type
}

func (n *network) count() int {
	found := 0
	for _, p := range n.plugins {
		if typeOf(p) == Type {
			found++
		}
	}
	return found
}

func (n *network) drop() {
	var kept []json.RawMessage
	for _, p := range n.plugins {
		if typeOf(p) != Type {
			kept = append(kept, p)
		}
	}
	n.plugins = kept
}

func (n *network) list() ([]byte, error) {
	raw, err := json.Marshal(n.plugins)
	if err != nil {
		return nil, err
	}
	n.fields["plugins"] = raw
	b, err := json.MarshalIndent(n.fields, "", "  ")
	return append(b, '\n'), err
}
