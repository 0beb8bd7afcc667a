package main

import (
	"fmt"
	"os"

	"assay.dev/test/lab"
)

// newNginx is a pair of nginx with mutual TLS 1.3 between them: one worker each,
// upstream connections kept, sessions resumed, no access log, no temporary files.
// HTTP/2 is spoken with the client alone: behind it nginx asks by HTTP/1.1. gRPC is
// HTTP/2 on every leg, with one call at a time on a connection between the two.
func newNginx(r *run, l *lab.Lab, pki *pki) *contender {
	client, server := l.Node(r, "nginx-client"), l.Node(r, "nginx-server")
	server.Start(r, backendCommand(r, l, "nginx-backend")...)
	pki.write(r, l, "/tmp/nginx-pki")
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	lacks, load, stream := []string{kindTCP}, "", ""
	if _, err := os.Stat(module); err == nil {
		lacks, load = nil, "load_module "+module+";"
	}
	const common = `
worker_processes 1; daemon off; error_log stderr error; pid %[1]s/nginx.pid; worker_rlimit_nofile 19000;
events { worker_connections 18000; }
%[3]s
http {
  access_log off; keepalive_requests 100000000; keepalive_timeout 300; tcp_nodelay on;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
  proxy_buffers 64 16k; proxy_buffer_size 16k; proxy_busy_buffers_size 64k; proxy_max_temp_file_size 0;
  http2_max_concurrent_streams 1024; client_max_body_size 0;
`
	if load != "" {
		stream = fmt.Sprintf(`
stream {
  server {
    listen 8445 ssl backlog=4096; tcp_nodelay on; proxy_buffer_size 16k; proxy_timeout 300;
    ssl_certificate /tmp/nginx-pki/server.crt; ssl_certificate_key /tmp/nginx-pki/server.key;
    ssl_client_certificate /tmp/nginx-pki/ca.crt; ssl_verify_client on;
    ssl_protocols TLSv1.3; ssl_session_cache shared:tcp:8m; ssl_session_timeout 1h;
    proxy_pass 127.0.0.1:%d;
  }
}`, portEcho)
	}
	dir := l.Dir(r, "/tmp/nginx-b", "")
	l.Write(r, dir+"/nginx.conf", fmt.Sprintf(load+common+`
  upstream app { server 127.0.0.1:%[4]d; keepalive 1024; keepalive_requests 100000000; }
  upstream calls { server 127.0.0.1:%[5]d; keepalive 1024; keepalive_requests 100000000; }
  ssl_certificate /tmp/nginx-pki/server.crt; ssl_certificate_key /tmp/nginx-pki/server.key;
  ssl_client_certificate /tmp/nginx-pki/ca.crt; ssl_verify_client on;
  ssl_protocols TLSv1.3; ssl_session_cache shared:mesh:8m; ssl_session_timeout 1h;
  server { listen 8443 ssl backlog=4096; location / { proxy_pass http://app; } }
  server { listen 8444 ssl http2 backlog=4096; location / { grpc_pass grpc://calls; } }
}`, dir, "", stream, portHTTP1, portGRPC))
	b := server.Start(r, "nginx", "-p", dir, "-c", dir+"/nginx.conf")
	if load != "" {
		stream = fmt.Sprintf(`
stream {
  server {
    listen 127.0.0.1:%[1]d backlog=4096; tcp_nodelay on; proxy_buffer_size 16k; proxy_timeout 300;
    proxy_ssl on; proxy_ssl_certificate /tmp/nginx-pki/client.crt; proxy_ssl_certificate_key /tmp/nginx-pki/client.key;
    proxy_ssl_trusted_certificate /tmp/nginx-pki/ca.crt; proxy_ssl_verify on; proxy_ssl_name server.bench;
    proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse on;
    proxy_pass %[2]s:8445;
  }
}`, portEcho, server.IPv4)
	}
	dir = l.Dir(r, "/tmp/nginx-a", "")
	l.Write(r, dir+"/nginx.conf", fmt.Sprintf(load+common+`
  upstream mesh { server %[2]s:8443; keepalive 1024; keepalive_requests 100000000; }
  upstream calls { server %[2]s:8444; keepalive 1024; keepalive_requests 100000000; }
  proxy_ssl_certificate /tmp/nginx-pki/client.crt; proxy_ssl_certificate_key /tmp/nginx-pki/client.key;
  proxy_ssl_trusted_certificate /tmp/nginx-pki/ca.crt; proxy_ssl_verify on; proxy_ssl_name server.bench;
  proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse on;
  grpc_ssl_certificate /tmp/nginx-pki/client.crt; grpc_ssl_certificate_key /tmp/nginx-pki/client.key;
  grpc_ssl_trusted_certificate /tmp/nginx-pki/ca.crt; grpc_ssl_verify on; grpc_ssl_name server.bench;
  grpc_ssl_protocols TLSv1.3; grpc_ssl_session_reuse on;
  server { listen 127.0.0.1:%[4]d backlog=4096; location / { proxy_pass https://mesh; } }
  server { listen 127.0.0.1:%[5]d http2 backlog=4096; location / { proxy_pass https://mesh; } }
  server { listen 127.0.0.1:%[6]d http2 backlog=4096; location / { grpc_pass grpcs://calls; } }
}`, dir, server.IPv4, stream, portHTTP1, portHTTP2, portGRPC))
	a := client.Start(r, "nginx", "-p", dir, "-c", dir+"/nginx.conf")
	return &contender{
		name: "nginx", client: client.Space, host: "127.0.0.1", addr: fmt.Sprintf("127.0.0.1:%d", portHTTP1), peer: server.IPv4.String(), lacks: lacks,
		proxies: once(func() []int { return append(tree(l, a.PID), tree(l, b.PID)...) }),
	}
}

// newHAProxy is a pair of HAProxy with mutual TLS 1.3 between them: one thread
// each, upstream connections shared and kept. What comes as HTTP/2 is HTTP/2 on every
// leg, many streams on a connection.
func newHAProxy(r *run, l *lab.Lab, pki *pki) *contender {
	client, server := l.Node(r, "haproxy-client"), l.Node(r, "haproxy-server")
	server.Start(r, backendCommand(r, l, "haproxy-backend")...)
	pki.write(r, l, "/tmp/haproxy-pki")
	const common = `
global
  nbthread 1
  maxconn 10500
  no strict-limits
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  maxconn 10500
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
`
	l.Write(r, "/tmp/haproxy-b/haproxy.cfg", common+fmt.Sprintf(`
frontend mesh
  bind :8443 ssl crt /tmp/haproxy-pki/server.pem ca-file /tmp/haproxy-pki/ca.crt verify required alpn http/1.1
  default_backend app
backend app
  server nginx 127.0.0.1:%[1]d pool-max-conn 1024 pool-low-conn 1024
frontend mesh2
  bind :8446 ssl crt /tmp/haproxy-pki/server.pem ca-file /tmp/haproxy-pki/ca.crt verify required alpn h2
  default_backend app2
backend app2
  server nginx 127.0.0.1:%[2]d proto h2
frontend calls
  bind :8444 ssl crt /tmp/haproxy-pki/server.pem ca-file /tmp/haproxy-pki/ca.crt verify required alpn h2
  default_backend calls
backend calls
  server app 127.0.0.1:%[3]d proto h2
frontend tcp
  mode tcp
  bind :8445 ssl crt /tmp/haproxy-pki/server.pem ca-file /tmp/haproxy-pki/ca.crt verify required
  default_backend tcp
backend tcp
  mode tcp
  server app 127.0.0.1:%[4]d
`, portHTTP1, portHTTP2, portGRPC, portEcho))
	b := server.Start(r, "haproxy", "-db", "-q", "-f", "/tmp/haproxy-b/haproxy.cfg")
	const prove = "ssl crt /tmp/haproxy-pki/client.pem ca-file /tmp/haproxy-pki/ca.crt verify required verifyhost server.bench"
	l.Write(r, "/tmp/haproxy-a/haproxy.cfg", common+fmt.Sprintf(`
frontend client
  bind 127.0.0.1:%[3]d
  default_backend mesh
backend mesh
  server peer %[1]s:8443 %[2]s alpn http/1.1 pool-max-conn 1024 pool-low-conn 1024
frontend client2
  bind 127.0.0.1:%[4]d proto h2
  default_backend mesh2
backend mesh2
  server peer %[1]s:8446 %[2]s alpn h2
frontend calls
  bind 127.0.0.1:%[5]d proto h2
  default_backend calls
backend calls
  server peer %[1]s:8444 %[2]s alpn h2
frontend tcp
  mode tcp
  bind 127.0.0.1:%[6]d
  default_backend tcp
backend tcp
  mode tcp
  server peer %[1]s:8445 %[2]s
`, server.IPv4, prove, portHTTP1, portHTTP2, portGRPC, portEcho))
	a := client.Start(r, "haproxy", "-db", "-q", "-f", "/tmp/haproxy-a/haproxy.cfg")
	return &contender{
		name: "haproxy", client: client.Space, host: "127.0.0.1", addr: fmt.Sprintf("127.0.0.1:%d", portHTTP1), peer: server.IPv4.String(),
		proxies: once(func() []int { return append(tree(l, a.PID), tree(l, b.PID)...) }),
	}
}
