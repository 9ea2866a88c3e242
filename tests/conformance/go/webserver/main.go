// Command webserver stands in for nginx and httpd in the images that critest wants: it serves one page on a port, IPv4 and IPv6,
// shows "nginx: master process" as its command line, writes /var/run/nginx.pid, and ends on SIGTERM and SIGQUIT.
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

const title = "nginx: master process nginx -g daemon off;"

func main() {
	if os.Args[0] != title {
		port := "80"
		if len(os.Args) > 1 {
			port = os.Args[1]
		}
		fail(syscall.Exec("/proc/self/exe", []string{title}, append(os.Environ(), "WEBSERVER_PORT="+port)))
	}
	fail(os.WriteFile("/var/run/nginx.pid", []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644))
	fmt.Println("httpd and nginx stand-in is serving")
	http.HandleFunc("/", func(response http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(response, "<html><title>Welcome to nginx!</title><body>It works!</body></html>")
	})
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGQUIT)
	go func() { fail(http.ListenAndServe(":"+os.Getenv("WEBSERVER_PORT"), nil)) }()
	<-ended
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
