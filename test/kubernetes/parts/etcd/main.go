// Command etcd is etcd as its own project ships it: Kubernetes' modules already
// require the server, so its version is the one that they are tested with.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
