// Package agent is one host of the mesh.
package agent
