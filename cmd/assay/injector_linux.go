package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/control"
	"assay.dev/kube/inject"
	installation "assay.dev/kube/install"
	"assay.dev/kube/publish"
)

// injectorFlags are those of the webhook that puts sidecars into pods.
type injectorFlags struct {
	image, pullPolicy, listen, control string
	pullSecrets                        []string
	metrics                            int32
}

func (f *injectorFlags) flags(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.image, "injector-image", "", "with --kubernetes: put a sidecar with this image into pods that ask for one, and let them join")
	flags.StringVar(&f.pullPolicy, "injector-pull-policy", "IfNotPresent", "of that image: Always, IfNotPresent or Never")
	flags.StringSliceVar(&f.pullSecrets, "injector-pull-secret", nil, "Secret to pull it with, in the pod's namespace; may be repeated")
	flags.Int32Var(&f.metrics, "injector-metrics-port", 0, "port of each such pod at which its sidecar serves Prometheus, to whoever reaches it (none)")
	flags.StringVar(&f.listen, "injector-listen", ":7443", "address on which the API server asks about pods, over HTTPS")
	flags.StringVar(&f.control, "injector-control", "", "HOST:PORT where sidecars reach control: an address, since they start before the pod's DNS can be asked")
}

// on reports whether there is an injector.
func (f *injectorFlags) on() bool { return f.image != "" }

// names are those by which the API server knows control.
func (f *injectorFlags) names(namespace string) []string {
	if !f.on() {
		return nil
	}
	return []string{installation.ControlName + "." + namespace + ".svc"}
}

func (f *injectorFlags) check(kubernetes bool) error {
	wrong := func(cause, remedy string) error {
		return &assay.Error{Kind: assay.Invalid, Op: "read flags", Err: errors.New(cause), Remedy: remedy}
	}
	switch {
	case !f.on():
		return nil
	case !kubernetes:
		return wrong("--injector-image is for --kubernetes", "")
	case !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, f.pullPolicy):
		return wrong(fmt.Sprintf("--injector-pull-policy %q", f.pullPolicy), "want Always, IfNotPresent or Never")
	case f.metrics < 0 || f.metrics > 65535:
		return wrong(fmt.Sprintf("--injector-metrics-port %d", f.metrics), "want 1 to 65535, or 0 for none")
	case slices.Contains(f.pullSecrets, ""):
		return wrong("--injector-pull-secret without a name", "")
	}
	if _, _, err := net.SplitHostPort(f.control); err != nil {
		return wrong("--injector-control: "+err.Error(), "name the address of control's Service, as [10.96.0.7]:7400")
	}
	return nil
}

// serve answers the API server until ctx ends. It closes the listener.
func (f *injectorFlags) serve(ctx context.Context, c *control.Control, l net.Listener, namespace string, log *slog.Logger) error {
	j := &inject.Injector{Image: f.image, PullPolicy: f.pullPolicy, PullSecrets: f.pullSecrets, Metrics: f.metrics, Control: f.control, Namespace: namespace, Version: buildVersion(),
		Roots: func() []byte { return publish.PEM(c.Roots()) }}
	server := &http.Server{
		Handler: j.Handler(log), TLSConfig: c.WebTLS(), ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 100, MaxReceiveBufferPerConnection: 256 << 10, MaxReceiveBufferPerStream: 64 << 10},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.ServeTLS(inject.Bounded(l), "", "") }()
	select {
	case err := <-ended:
		return &assay.Error{Kind: assay.Internal, Op: "serve the injector on " + l.Addr().String(), Err: err}
	case <-ctx.Done():
	}
	bounded, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if server.Shutdown(bounded) != nil {
		server.Close()
	}
	<-ended
	return nil
}
