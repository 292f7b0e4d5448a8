// Command probe shows how a cluster's network treats packets and names.
//
//	probe serve PORT               answers UDP datagrams and HTTP requests with the sender's address and what was sent
//	probe ask udp|http ADDRESS TEXT  prints its own address and the answer, one in a line
//	probe resolve NAME             prints the name's addresses, sorted, one in a line
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"
)

// How long an answer may take, the next datagram being sent after each patience.
const (
	deadline = 10 * time.Second
	patience = 500 * time.Millisecond
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "serve":
		return serve(":" + arguments[1])
	case len(arguments) == 4 && arguments[0] == "ask" && arguments[1] == "udp":
		return askUDP(arguments[2], arguments[3])
	case len(arguments) == 4 && arguments[0] == "ask" && arguments[1] == "http":
		return askHTTP(arguments[2], arguments[3])
	case len(arguments) == 2 && arguments[0] == "resolve":
		return resolve(arguments[1])
	}
	return errors.New("usage: probe serve PORT | ask udp|http ADDRESS TEXT | resolve NAME")
}

func serve(address string) error {
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- echo(socket) }()
	go func() {
		failed <- http.ListenAndServe(address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s %s", r.RemoteAddr, strings.TrimPrefix(r.URL.Path, "/"))
		}))
	}()
	return <-failed
}

func echo(socket net.PacketConn) error {
	buffer := make([]byte, 2048)
	for {
		n, from, err := socket.ReadFrom(buffer)
		if err != nil {
			return err
		}
		if _, err := socket.WriteTo(fmt.Appendf(nil, "%s %s", from, buffer[:n]), from); err != nil {
			fmt.Fprintln(os.Stderr, from, err)
		}
	}
}

func askUDP(address, text string) error {
	socket, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer socket.Close()
	buffer := make([]byte, 2048)
	for begin := time.Now(); ; {
		var n int
		_, err := socket.Write([]byte(text))
		if err == nil {
			_ = socket.SetReadDeadline(time.Now().Add(patience))
			n, err = socket.Read(buffer)
		}
		switch {
		case err == nil:
			fmt.Printf("%s\n%s\n", socket.LocalAddr(), buffer[:n])
			return nil
		case time.Since(begin) > deadline:
			return err
		case !os.IsTimeout(err):
			time.Sleep(patience)
		}
	}
}

func askHTTP(address, text string) error {
	var local net.Addr
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		stream, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			local = stream.LocalAddr()
		}
		return stream, err
	}
	client := http.Client{Timeout: deadline, Transport: &http.Transport{DialContext: dial}}
	answer, err := client.Get("http://" + address + "/" + text)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s\n", local, body)
	return nil
}

func resolve(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	found, err := net.DefaultResolver.LookupHost(ctx, name)
	// A name that is new is known in a moment.
	for err != nil && ctx.Err() == nil {
		time.Sleep(patience)
		found, err = net.DefaultResolver.LookupHost(ctx, name)
	}
	if err != nil {
		return err
	}
	slices.Sort(found)
	fmt.Println(strings.Join(slices.Compact(found), "\n"))
	return nil
}
