package main

import (
	"net"
	"os"
)

// notify tells the service manager what became of us (sd_notify(3)). Without
// NOTIFY_SOCKET there is nobody to tell; a manager that does not listen is not our
// trouble.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' { // abstract
		path = "\x00" + path[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	conn.Write([]byte(state))
}
