package control

import "assay.dev/api"

// The documents of Operator.List are in package api, where whoever calls it finds
// them.
type (
	ServiceView     = api.ServiceView
	WorkloadView    = api.WorkloadView
	NamespaceView   = api.NamespaceView
	ObjectView      = api.ObjectView
	ObjectStatus    = api.ObjectStatus
	HostView        = api.HostView
	CertificateView = api.CertificateView
	SignalsView     = api.SignalsView
	BundleView      = api.BundleView
	RootView        = api.RootView
	BehindView      = api.BehindView
)
