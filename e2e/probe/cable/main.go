// Command cable carries Ethernet frames between two TAP devices, which it makes, with the faults of real networks.
//
//	cable ONE OTHER SOCKET
//
// At the UNIX socket it reads a line of JSON, what to do with frames from now on in either direction, and answers with a
// line of JSON, what became of all frames so far. Without a line it carries everything at once.
package main

import (
	"bufio"
	"container/heap"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Faults of one direction.
type Faults struct {
	// Of every frame, in microseconds.
	Delay int64 `json:"delay"`
	// Up to so much is added, evenly, in microseconds.
	Jitter int64 `json:"jitter"`
	// Share of frames, 0 to 1.
	Loss float64 `json:"loss"`
	// Whether a frame may arrive before an earlier one.
	Overtaking bool `json:"overtaking"`
}

// Counts of one direction.
type Counts struct {
	Carried uint64 `json:"carried"`
	Lost    uint64 `json:"lost"`
}

// Setting is what the socket takes: faults from ONE to OTHER, and from OTHER to ONE.
type Setting struct {
	Seed uint64 `json:"seed"`
	Up   Faults `json:"up"`
	Down Faults `json:"down"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 4 {
		return fmt.Errorf("usage: cable ONE OTHER SOCKET")
	}
	one, err := tap(os.Args[1])
	if err != nil {
		return fmt.Errorf("%s: %w", os.Args[1], err)
	}
	other, err := tap(os.Args[2])
	if err != nil {
		return fmt.Errorf("%s: %w", os.Args[2], err)
	}
	up, down := newWire(), newWire()
	failed := make(chan error, 3)
	for _, wire := range []struct {
		*wire
		from, to *os.File
	}{{up, one, other}, {down, other, one}} {
		go func() { failed <- wire.read(wire.from) }()
		go wire.write(wire.to)
	}
	os.Remove(os.Args[3])
	listener, err := net.Listen("unix", os.Args[3])
	if err != nil {
		return err
	}
	go func() { failed <- serve(listener, up, down) }()
	return <-failed
}

// tap makes a device that ends with this process.
func tap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func serve(listener net.Listener, up, down *wire) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			var setting *Setting
			line, err := bufio.NewReader(conn).ReadBytes('\n')
			if err == nil {
				err = json.Unmarshal(line, &setting)
			}
			if err != nil {
				fmt.Fprintln(conn, err)
				return
			}
			// null asks for the counts alone.
			if setting != nil {
				up.set(setting.Up, setting.Seed)
				down.set(setting.Down, ^setting.Seed)
			}
			_ = json.NewEncoder(conn).Encode(map[string]Counts{"up": up.counted(), "down": down.counted()})
		}()
	}
}

// A frame under way.
type frame struct {
	due    time.Time
	number uint64
	bytes  []byte
}

type queue []frame

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return q[i].due.Before(q[j].due) || q[i].due.Equal(q[j].due) && q[i].number < q[j].number
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(frame)) }
func (q *queue) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = frame{}
	*q = old[:len(old)-1]
	return last
}

// One direction.
type wire struct {
	mutex    sync.Mutex
	faults   Faults
	random   *rand.Rand
	underWay queue
	number   uint64
	lastDue  time.Time
	counts   Counts
	wake     chan struct{}
}

func newWire() *wire {
	return &wire{random: rand.New(rand.NewPCG(0, 0)), wake: make(chan struct{}, 1)}
}

func (w *wire) set(faults Faults, seed uint64) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.faults, w.random = faults, rand.New(rand.NewPCG(seed, 0))
}

func (w *wire) counted() Counts {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return w.counts
}

// read takes frames in until the device goes.
func (w *wire) read(from *os.File) error {
	buffer := make([]byte, 65536)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return err
		}
		w.enter(time.Now(), append([]byte(nil), buffer[:n]...))
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

func (w *wire) enter(now time.Time, bytes []byte) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	// Both are drawn for every frame, so that one fault's share changes nothing about the other.
	jitter, lost := w.random.Float64(), w.random.Float64()
	// A queue without a bound would hide a reader that cannot keep up.
	if lost < w.faults.Loss || len(w.underWay) >= mostUnderWay {
		w.counts.Lost++
		return
	}
	delay := float64(w.faults.Delay) + jitter*float64(w.faults.Jitter)
	due := now.Add(time.Duration(delay * float64(time.Microsecond)))
	if !w.faults.Overtaking && due.Before(w.lastDue) {
		due = w.lastDue
	}
	w.lastDue = due
	w.number++
	heap.Push(&w.underWay, frame{due, w.number, bytes})
}

// write lets out what is due.
func (w *wire) write(to *os.File) {
	for {
		due, wait := w.leave(time.Now())
		for _, bytes := range due {
			// A device that is down loses what it is given.
			_, _ = to.Write(bytes)
		}
		if wait < 0 {
			<-w.wake
			continue
		}
		select {
		case <-w.wake:
		case <-time.After(wait):
		}
	}
}

// leave gives what has arrived, and how long the next one takes; less than 0: there is none.
func (w *wire) leave(now time.Time) ([][]byte, time.Duration) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	var arrived [][]byte
	for len(w.underWay) > 0 {
		if wait := w.underWay[0].due.Sub(now); wait > 0 {
			return arrived, wait
		}
		arrived = append(arrived, heap.Pop(&w.underWay).(frame).bytes)
		w.counts.Carried++
	}
	return arrived, -1
}

// About 100 ms at 1 Gbit/s of full frames.
const mostUnderWay = 10_000
