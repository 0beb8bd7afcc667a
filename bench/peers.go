package main

import (
	"fmt"

	"assay.dev/test/lab"
)

// newNginx is a pair of nginx with mutual TLS 1.3 between them: one worker each,
// upstream connections kept, sessions resumed, no access log, no temporary files.
func newNginx(r *run, l *lab.Lab, pki *pki) *contender {
	client, server := l.Node(r, "nginx-client"), l.Node(r, "nginx-server")
	server.Start(r, backendCommand(r, l, "nginx-backend")...)
	pki.write(r, l, "/tmp/nginx-pki")
	const common = `
worker_processes 1; daemon off; error_log stderr error; pid %[1]s/nginx.pid; worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
  access_log off; keepalive_requests 100000000; keepalive_timeout 300; tcp_nodelay on;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
  proxy_buffers 64 16k; proxy_buffer_size 16k; proxy_busy_buffers_size 64k; proxy_max_temp_file_size 0;
`
	dir := l.Dir(r, "/tmp/nginx-b", "")
	l.Write(r, dir+"/nginx.conf", fmt.Sprintf(common+`
  upstream app { server 127.0.0.1:8081; keepalive 1024; keepalive_requests 100000000; }
  server {
    listen 8443 ssl backlog=4096;
    ssl_certificate /tmp/nginx-pki/server.crt; ssl_certificate_key /tmp/nginx-pki/server.key;
    ssl_client_certificate /tmp/nginx-pki/ca.crt; ssl_verify_client on;
    ssl_protocols TLSv1.3; ssl_session_cache shared:mesh:8m; ssl_session_timeout 1h;
    location / { proxy_pass http://app; }
  }
}`, dir))
	b := server.Start(r, "nginx", "-p", dir, "-c", dir+"/nginx.conf")
	dir = l.Dir(r, "/tmp/nginx-a", "")
	l.Write(r, dir+"/nginx.conf", fmt.Sprintf(common+`
  upstream mesh { server %[2]s:8443; keepalive 1024; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:8080 backlog=4096;
    proxy_ssl_certificate /tmp/nginx-pki/client.crt; proxy_ssl_certificate_key /tmp/nginx-pki/client.key;
    proxy_ssl_trusted_certificate /tmp/nginx-pki/ca.crt; proxy_ssl_verify on; proxy_ssl_name server.bench;
    proxy_ssl_protocols TLSv1.3; proxy_ssl_session_reuse on;
    location / { proxy_pass https://mesh; }
  }
}`, dir, server.IPv4))
	a := client.Start(r, "nginx", "-p", dir, "-c", dir+"/nginx.conf")
	return &contender{
		name: "nginx", client: client.Space, url: "http://127.0.0.1:8080", addr: "127.0.0.1:8080", peer: server.IPv4.String(),
		proxies: once(func() []int { return append(tree(l, a.PID), tree(l, b.PID)...) }),
	}
}

// newHAProxy is a pair of HAProxy with mutual TLS 1.3 between them: one thread
// each, upstream connections shared and kept.
func newHAProxy(r *run, l *lab.Lab, pki *pki) *contender {
	client, server := l.Node(r, "haproxy-client"), l.Node(r, "haproxy-server")
	server.Start(r, backendCommand(r, l, "haproxy-backend")...)
	pki.write(r, l, "/tmp/haproxy-pki")
	const common = `
global
  nbthread 1
  maxconn 4096
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  option http-keep-alive
  http-reuse always
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
`
	l.Write(r, "/tmp/haproxy-b/haproxy.cfg", common+`
frontend mesh
  bind :8443 ssl crt /tmp/haproxy-pki/server.pem ca-file /tmp/haproxy-pki/ca.crt verify required alpn http/1.1
  default_backend app
backend app
  server nginx 127.0.0.1:8081 pool-max-conn 1024 pool-low-conn 1024
`)
	b := server.Start(r, "haproxy", "-db", "-q", "-f", "/tmp/haproxy-b/haproxy.cfg")
	l.Write(r, "/tmp/haproxy-a/haproxy.cfg", common+fmt.Sprintf(`
frontend client
  bind 127.0.0.1:8080
  default_backend mesh
backend mesh
  server peer %s:8443 ssl crt /tmp/haproxy-pki/client.pem ca-file /tmp/haproxy-pki/ca.crt verify required verifyhost server.bench alpn http/1.1 pool-max-conn 1024 pool-low-conn 1024
`, server.IPv4))
	a := client.Start(r, "haproxy", "-db", "-q", "-f", "/tmp/haproxy-a/haproxy.cfg")
	return &contender{
		name: "haproxy", client: client.Space, url: "http://127.0.0.1:8080", addr: "127.0.0.1:8080", peer: server.IPv4.String(),
		proxies: once(func() []int { return append(tree(l, a.PID), tree(l, b.PID)...) }),
	}
}
