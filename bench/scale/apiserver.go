package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
)

// apiServer is as much of a Kubernetes API server as control talks to: lists and watches with
// versions and bookmarks, in protobuf or JSON as asked for, over HTTP/2 and TLS; reviews of
// tokens; one ConfigMap. It checks no rights.
type apiServer struct {
	codecs serializer.CodecFactory
	server *httptest.Server
	ca     []byte // PEM

	mu      sync.Mutex
	version uint64
	kinds   map[string]*collection // by path
	trust   corev1.ConfigMap
	ended   chan struct{}
	sent    map[string]int // bytes of watches, by path
}

// collection is all objects of one kind, and what became of them.
type collection struct {
	version schema.GroupVersion
	list    func() runtime.Object
	one     func() runtime.Object
	objects map[string]runtime.Object // by namespace and name; never changed
	history []change
	woken   chan struct{} // closed at a change
}

// change is an event of a watch.
type change struct {
	version uint64
	kind    watch.EventType
	object  runtime.Object
}

// remembered bounds the changes from which a watch may go on.
const remembered = 50_000

func newAPIServer() (*apiServer, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	a := &apiServer{codecs: serializer.NewCodecFactory(scheme), kinds: map[string]*collection{}, ended: make(chan struct{}), sent: map[string]int{}}
	a.trust.Namespace, a.trust.Name = meshNamespace, "assay-trust"
	a.kind("/api/v1/pods", corev1.SchemeGroupVersion, &corev1.PodList{}, &corev1.Pod{})
	a.kind("/api/v1/services", corev1.SchemeGroupVersion, &corev1.ServiceList{}, &corev1.Service{})
	a.kind("/api/v1/nodes", corev1.SchemeGroupVersion, &corev1.NodeList{}, &corev1.Node{})
	a.kind("/apis/discovery.k8s.io/v1/endpointslices", discoveryv1.SchemeGroupVersion, &discoveryv1.EndpointSliceList{}, &discoveryv1.EndpointSlice{})
	for _, d := range definitions {
		for resource, kind := range d.kinds {
			one, list := &unstructured.Unstructured{}, &unstructured.UnstructuredList{}
			one.SetGroupVersionKind(d.version.WithKind(kind))
			list.SetGroupVersionKind(d.version.WithKind(kind + "List"))
			a.kind("/apis/"+d.version.String()+"/"+resource, d.version, list, one)
		}
	}
	cert, ca, err := serverCertificate()
	if err != nil {
		return nil, err
	}
	a.ca = ca
	a.server = httptest.NewUnstartedServer(a)
	a.server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	a.server.EnableHTTP2 = true
	a.server.StartTLS()
	return a, nil
}

// definitions are installed, and nobody has declared anything.
var definitions = []struct {
	version schema.GroupVersion
	kinds   map[string]string
}{
	{schema.GroupVersion{Group: "gateway.networking.k8s.io", Version: "v1"}, map[string]string{
		"httproutes": "HTTPRoute", "grpcroutes": "GRPCRoute", "tlsroutes": "TLSRoute", "referencegrants": "ReferenceGrant"}},
	{schema.GroupVersion{Group: "assay.dev", Version: "v1alpha1"}, map[string]string{
		"meshconfigs": "MeshConfig", "egresses": "Egress", "trafficpolicies": "TrafficPolicy"}},
}

func (a *apiServer) kind(path string, version schema.GroupVersion, list, one runtime.Object) {
	a.kinds[path] = &collection{
		version: version, objects: map[string]runtime.Object{}, woken: make(chan struct{}),
		list: func() runtime.Object { return list.DeepCopyObject() }, one: func() runtime.Object { return one.DeepCopyObject() },
	}
}

func (a *apiServer) close() {
	close(a.ended)
	a.server.CloseClientConnections()
	a.server.Close()
}

// kubeconfig is how control reaches it.
func (a *apiServer) kubeconfig() string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: scale, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: control, user: {token: control}}]
contexts: [{name: scale, context: {cluster: scale, user: control}}]
current-context: scale
`, a.server.URL, base64.StdEncoding.EncodeToString(a.ca))
}

func pathOf(o runtime.Object) string {
	switch o.(type) {
	case *corev1.Pod:
		return "/api/v1/pods"
	case *corev1.Service:
		return "/api/v1/services"
	case *corev1.Node:
		return "/api/v1/nodes"
	case *discoveryv1.EndpointSlice:
		return "/apis/discovery.k8s.io/v1/endpointslices"
	}
	panic(fmt.Sprintf("scale: nobody writes %T", o))
}

// put writes an object, which is the server's from now on.
func (a *apiServer) put(o runtime.Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.kinds[pathOf(o)]
	kind := watch.Added
	if _, ok := c.objects[keyOf(o)]; ok {
		kind = watch.Modified
	}
	a.record(c, kind, o)
	c.objects[keyOf(o)] = o
}

// remove removes an object.
func (a *apiServer) remove(o runtime.Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.kinds[pathOf(o)]
	delete(c.objects, keyOf(o))
	a.record(c, watch.Deleted, o.DeepCopyObject())
}

func (a *apiServer) record(c *collection, kind watch.EventType, o runtime.Object) {
	a.version++
	accessor, err := meta.Accessor(o)
	if err != nil {
		panic(err)
	}
	accessor.SetResourceVersion(strconv.FormatUint(a.version, 10))
	if len(c.history) == remembered {
		c.history = append([]change(nil), c.history[remembered/2:]...)
	}
	c.history = append(c.history, change{a.version, kind, o})
	close(c.woken)
	c.woken = make(chan struct{})
}

func keyOf(o runtime.Object) string {
	accessor, err := meta.Accessor(o)
	if err != nil {
		panic(err)
	}
	return accessor.GetNamespace() + "/" + accessor.GetName()
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	c := a.kinds[r.URL.Path]
	a.mu.Unlock()
	q := r.URL.Query()
	switch {
	case c != nil && r.Method == http.MethodGet && (q.Get("watch") == "true" || q.Get("watch") == "1"):
		a.watch(w, r, c)
	case c != nil && r.Method == http.MethodGet:
		a.list(w, r, c)
	case r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" && r.Method == http.MethodPost:
		a.review(w, r)
	case r.URL.Path == "/api/v1/namespaces/"+meshNamespace+"/configmaps/"+a.trust.Name:
		a.configMap(w, r)
	case a.definition(w, r):
	default:
		writeJSON(w, http.StatusNotFound, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
			Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound})
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v) // a client that has gone does not mind
}

// definition says which kinds a group has.
func (a *apiServer) definition(w http.ResponseWriter, r *http.Request) bool {
	for _, d := range definitions {
		if r.URL.Path != "/apis/"+d.version.String() {
			continue
		}
		list := metav1.APIResourceList{GroupVersion: d.version.String()}
		for resource, kind := range d.kinds {
			list.APIResources = append(list.APIResources, metav1.APIResource{Name: resource, Kind: kind, Namespaced: true})
		}
		writeJSON(w, http.StatusOK, list)
		return true
	}
	return false
}

// negotiated is what a client wants to read.
type negotiated struct {
	runtime.SerializerInfo
	object, stream runtime.Encoder
}

func (a *apiServer) negotiate(r *http.Request, c *collection) negotiated {
	all := a.codecs.SupportedMediaTypes()
	info, _ := runtime.SerializerInfoForMediaType(all, runtime.ContentTypeJSON)
	_, plain := c.one().(*unstructured.Unstructured)
	if strings.HasPrefix(r.Header.Get("Accept"), runtime.ContentTypeProtobuf) && !plain {
		info, _ = runtime.SerializerInfoForMediaType(all, runtime.ContentTypeProtobuf)
	}
	n := negotiated{SerializerInfo: info}
	encode := a.codecs.WithoutConversion()
	n.object = encode.EncoderForVersion(info.Serializer, c.version)
	n.stream = encode.EncoderForVersion(info.StreamSerializer.Serializer, corev1.SchemeGroupVersion)
	if plain {
		n.object = unstructured.UnstructuredJSONScheme
	}
	return n
}

func (a *apiServer) list(w http.ResponseWriter, r *http.Request, c *collection) {
	n := a.negotiate(r, c)
	list := c.list()
	a.mu.Lock()
	var items []runtime.Object
	for _, o := range c.objects {
		items = append(items, o)
	}
	version := strconv.FormatUint(a.version, 10)
	a.mu.Unlock()
	if len(items) > 0 {
		if err := meta.SetList(list, items); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	accessor, err := meta.ListAccessor(list)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	accessor.SetResourceVersion(version)
	w.Header().Set("Content-Type", n.MediaType)
	n.object.Encode(list, w) // a client that has gone does not mind
}

// watch sends what there is, when asked for it, and then what changes.
func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, c *collection) {
	n := a.negotiate(r, c)
	q := r.URL.Query()
	from, _ := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	initial := q.Get("sendInitialEvents") == "true" || from == 0
	seconds, _ := strconv.Atoi(q.Get("timeoutSeconds"))
	if seconds == 0 {
		seconds = 1800
	}
	contentType := n.MediaType
	if !n.EncodesAsText {
		contentType += ";type=watch"
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(http.StatusOK)
	s := &watchStream{negotiated: n, flusher: w.(http.Flusher), path: r.URL.Path, a: a}
	s.frames = n.StreamSerializer.Framer.NewFrameWriter(countingWriter{w, s})
	if initial {
		a.mu.Lock()
		from = a.version
		list := make([]runtime.Object, 0, len(c.objects))
		for _, o := range c.objects {
			list = append(list, o)
		}
		a.mu.Unlock()
		for _, o := range list {
			if s.send(watch.Added, o) != nil {
				return
			}
		}
		if s.bookmark(c, from, true) != nil {
			return
		}
	}
	s.flush()
	over := time.NewTimer(time.Duration(seconds) * time.Second)
	defer over.Stop()
	bookmarks := time.NewTicker(time.Minute)
	defer bookmarks.Stop()
	for {
		a.mu.Lock()
		next := c.since(from)
		woken := c.woken
		now := a.version
		a.mu.Unlock()
		for _, ch := range next {
			if s.send(ch.kind, ch.object) != nil {
				return
			}
			from = ch.version
		}
		s.flush()
		select {
		case <-woken:
		case <-bookmarks.C:
			from = max(from, now)
			if s.bookmark(c, from, false) != nil {
				return
			}
		case <-over.C:
			return
		case <-r.Context().Done():
			return
		case <-a.ended:
			return
		}
	}
}

// since returns the changes after a version.
func (c *collection) since(version uint64) []change {
	i := len(c.history)
	for i > 0 && c.history[i-1].version > version {
		i--
	}
	return append([]change(nil), c.history[i:]...)
}

type watchStream struct {
	negotiated
	a       *apiServer
	path    string
	frames  io.Writer
	flusher http.Flusher
	buf     bytes.Buffer
	unsent  int
}

type countingWriter struct {
	io.Writer
	s *watchStream
}

func (w countingWriter) Write(b []byte) (int, error) {
	w.s.unsent += len(b)
	return w.Writer.Write(b)
}

func (s *watchStream) send(kind watch.EventType, o runtime.Object) error {
	s.buf.Reset()
	if err := s.object.Encode(o, &s.buf); err != nil {
		return err
	}
	return s.stream.Encode(&metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: s.buf.Bytes()}}, s.frames)
}

func (s *watchStream) flush() {
	s.flusher.Flush()
	if s.unsent > 0 {
		s.a.mu.Lock()
		s.a.sent[s.path] += s.unsent
		s.a.mu.Unlock()
		s.unsent = 0
	}
}

// bookmark says how far the watch has come; last ends what there was at its beginning.
func (s *watchStream) bookmark(c *collection, version uint64, last bool) error {
	o := c.one()
	accessor, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	accessor.SetResourceVersion(strconv.FormatUint(version, 10))
	if last {
		accessor.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	}
	return s.send(watch.Bookmark, o)
}

// review takes every token for what it says of itself.
func (a *apiServer) review(w http.ResponseWriter, r *http.Request) {
	var review authenticationv1.TokenReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var said struct {
		Sub  string
		Aud  []string
		Node string
	}
	part := strings.Split(review.Spec.Token, ".")
	if payload, err := base64.RawURLEncoding.DecodeString(part[min(1, len(part)-1)]); err == nil && json.Unmarshal(payload, &said) == nil {
		review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: said.Aud, User: authenticationv1.UserInfo{
			Username: said.Sub, Extra: map[string]authenticationv1.ExtraValue{"authentication.kubernetes.io/node-name": {said.Node}}}}
	}
	writeJSON(w, http.StatusCreated, review)
}

// agentToken is a token that an agent shows.
func agentToken(node string) string {
	payload, err := json.Marshal(map[string]any{"sub": "system:serviceaccount:" + meshNamespace + ":assay-agent", "aud": []string{"assay"}, "node": node})
	if err != nil {
		panic(err)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(payload) + ".c2ln"
}

// configMap is that of the mesh's roots.
func (a *apiServer) configMap(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.Method == http.MethodPatch {
		var patch corev1.ConfigMap
		if err := json.NewDecoder(r.Body).Decode(&patch); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.trust.Data = patch.Data
	}
	answer := a.trust
	answer.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"}
	writeJSON(w, http.StatusOK, answer)
}

// roots are those that control has published; none yet is an error.
func (a *apiServer) roots() ([]*x509.Certificate, error) {
	a.mu.Lock()
	rest := []byte(a.trust.Data["roots.pem"])
	a.mu.Unlock()
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("control has published no roots yet")
	}
	return out, nil
}

// written returns how many bytes of watches were sent.
func (a *apiServer) written() (total int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.sent {
		total += n
	}
	return total
}

func serverCertificate() (cert tls.Certificate, ca []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "scale"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return cert, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
