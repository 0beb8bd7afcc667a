package suite

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

// TestConformance is the specification's own suite; its flags say what it runs.
func TestConformance(t *testing.T) { conformance.RunConformance(t) }
