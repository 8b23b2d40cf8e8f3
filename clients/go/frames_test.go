package itemcache_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"

	itemcache "github.com/itemcache/itemcache/clients/go"
)

// recorder keeps what a client writes to its connections.
type recorder struct {
	mutex   sync.Mutex
	written []*bytes.Buffer
}

type recorded struct {
	net.Conn
	recorder *recorder
	written  *bytes.Buffer
}

func (r *recorder) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	written := new(bytes.Buffer)
	r.written = append(r.written, written)
	return &recorded{conn, r, written}, nil
}

func (c *recorded) Write(data []byte) (int, error) {
	c.recorder.mutex.Lock()
	c.written.Write(data)
	c.recorder.mutex.Unlock()
	return c.Conn.Write(data)
}

// frames counts the HTTP/2 frames by their type (RFC 9113, section 4.1); acknowledgements do not count.
func (r *recorder) frames() map[byte]int {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	counts := map[byte]int{}
	for _, written := range r.written {
		data := bytes.TrimPrefix(written.Bytes(), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		for len(data) >= 9 {
			length := 9 + int(binary.BigEndian.Uint32(data)>>8)
			isAck := data[4]&1 != 0 && (data[3] == 4 || data[3] == 6)
			if !isAck {
				counts[data[3]]++
			}
			if length > len(data) {
				break
			}
			data = data[length:]
		}
	}
	return counts
}

func TestACallCostsTheServerNoPing(t *testing.T) {
	const headers, ping = 1, 6
	var recorder recorder
	client := connect(t, itemcache.Options{DialOptions: []grpc.DialOption{grpc.WithContextDialer(recorder.dial)}})
	for range 20 {
		must(client.GetMany(t.Context(), []string{"1", "2"}, nil))
	}
	if counts := recorder.frames(); counts[headers] < 20 || counts[ping] > 0 {
		t.Errorf("%d calls and %d pings", counts[headers], counts[ping])
	}
}
