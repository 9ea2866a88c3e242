// Command spdystream records how the SPDY library of Kubernetes' Go clients, github.com/moby/spdystream, speaks and listens.
// test_spdystream.py compares crisp's frames with the recordings.
//
//	go run . write >client.txt             records what a client writes for each action
//	go run . read <server.txt >read.txt    records how the library reads the frames that crisp's Encoder wrote
package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/moby/spdystream"
	"github.com/moby/spdystream/spdy"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "write" {
		write()
	} else if len(os.Args) == 2 && os.Args[1] == "read" {
		read()
	} else {
		fail(errors.New("usage: spdystream write | read"))
	}
}

// recorder is a connection that keeps a copy of what is written to it.
type recorder struct {
	net.Conn
	lock    sync.Mutex
	written []byte
}

func (r *recorder) Write(data []byte) (int, error) {
	r.lock.Lock()
	r.written = append(r.written, data...)
	r.lock.Unlock()
	return r.Conn.Write(data)
}

// take waits until something has been written and nothing more comes, and returns it.
func (r *recorder) take() []byte {
	for before := -1; ; time.Sleep(50 * time.Millisecond) {
		r.lock.Lock()
		length := len(r.written)
		if length > 0 && length == before {
			taken := r.written
			r.written = nil
			r.lock.Unlock()
			return taken
		}
		r.lock.Unlock()
		before = length
	}
}

func write() {
	ours, theirs := net.Pipe()
	go io.Copy(io.Discard, theirs)
	wire := &recorder{Conn: ours}
	client, err := spdystream.NewConnection(wire, false)
	fail(err)
	fmt.Println("# What a client of github.com/moby/spdystream v0.5.1 writes for each action, in hexadecimal and in this order.")
	fmt.Println("# Made by `go run . write >client.txt`. All headers go through one zlib stream.")
	record := func(action string, err error) {
		fail(err)
		fmt.Printf("%s: %s\n", action, hex.EncodeToString(wire.take()))
	}
	open := func(name string, headers ...string) *spdystream.Stream {
		// As k8s.io/client-go does it: tools/remotecommand/v2.go, tools/portforward/portforward.go.
		header := http.Header{}
		for i := 0; i < len(headers); i += 2 {
			header.Set(headers[i], headers[i+1])
		}
		stream, err := client.CreateStream(header, nil, false)
		record("open "+name, err)
		return stream
	}
	open("error", "streamType", "error")
	stdin := open("stdin", "streamType", "stdin")
	stdout := open("stdout", "streamType", "stdout")
	open("stderr", "streamType", "stderr")
	open("resize", "streamType", "resize")
	_, err = stdin.Write([]byte("hello\n"))
	record("write to stdin", err)
	record("close stdin", stdin.Close())
	open("forwarded error", "streamType", "error", "port", "8080", "requestID", "0")
	data := open("forwarded data", "streamType", "data", "port", "8080", "requestID", "0")
	_, err = data.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
	record("write to forwarded data", err)
	record("reset forwarded data", data.Reset())
	record("reset stdout", stdout.Reset())
	go client.Ping()
	record("ping", nil)
	record("close", client.Close())
}

func read() {
	var frames bytes.Buffer
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if _, text, found := strings.Cut(lines.Text(), ": "); found && !strings.HasPrefix(lines.Text(), "#") {
			raw, err := hex.DecodeString(text)
			fail(err)
			frames.Write(raw)
		}
	}
	framer, err := spdy.NewFramer(io.Discard, &frames)
	fail(err)
	fmt.Println("# How github.com/moby/spdystream v0.5.1 reads the frames of server.txt. Made by `go run . read <server.txt >read.txt`.")
	for {
		frame, err := framer.ReadFrame()
		if errors.Is(err, io.EOF) {
			return
		}
		fail(err)
		fmt.Println(described(frame))
	}
}

func described(frame spdy.Frame) string {
	switch frame := frame.(type) {
	case *spdy.SynStreamFrame:
		return fmt.Sprintf("SYN_STREAM stream=%d headers=%s", frame.StreamId, sorted(frame.Headers))
	case *spdy.SynReplyFrame:
		return fmt.Sprintf("SYN_REPLY stream=%d headers=%s", frame.StreamId, sorted(frame.Headers))
	case *spdy.DataFrame:
		return fmt.Sprintf("DATA stream=%d fin=%t %q", frame.StreamId, frame.Flags&spdy.DataFlagFin != 0, frame.Data)
	case *spdy.RstStreamFrame:
		return fmt.Sprintf("RST_STREAM stream=%d status=%d", frame.StreamId, frame.Status)
	case *spdy.PingFrame:
		return fmt.Sprintf("PING id=%d", frame.Id)
	case *spdy.SettingsFrame:
		return fmt.Sprintf("SETTINGS %d=%d", frame.FlagIdValues[0].Id, frame.FlagIdValues[0].Value)
	case *spdy.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW_UPDATE stream=%d delta=%d", frame.StreamId, frame.DeltaWindowSize)
	case *spdy.GoAwayFrame:
		return fmt.Sprintf("GOAWAY last=%d status=%d", frame.LastGoodStreamId, frame.Status)
	}
	return fmt.Sprintf("%T", frame)
}

func sorted(headers http.Header) string {
	pairs := []string{}
	for name, values := range headers {
		pairs = append(pairs, fmt.Sprintf("%s:%s", strings.ToLower(name), strings.Join(values, ",")))
	}
	sort.Strings(pairs)
	return "[" + strings.Join(pairs, " ") + "]"
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
