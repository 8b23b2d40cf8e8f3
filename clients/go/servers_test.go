package itemcache_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// servers are what clients/test-servers.ts starts: two real ones that a test may kill, and one with TLS and tokens.
type servers struct {
	Targets []string `json:"targets"`
	Secure  struct {
		Target string `json:"target"`
		CA     string `json:"ca"`
		Writer string `json:"writer"`
		Reader string `json:"reader"`
	} `json:"secure"`

	commands io.WriteCloser
	answers  *bufio.Scanner
}

var running servers

// target is both servers behind one client.
func (s *servers) target() string { return s.Targets[0] + "," + s.Targets[1] }

func (s *servers) do(t *testing.T, command string) {
	t.Helper()
	if _, err := fmt.Fprintln(s.commands, command); err != nil {
		t.Fatal(err)
	}
	if !s.next() {
		t.Fatalf("%q was not done", command)
	}
}

// next reads the next line of JSON; what else is printed on the way is for people.
func (s *servers) next() bool {
	for s.answers.Scan() {
		if line := s.answers.Bytes(); bytes.HasPrefix(line, []byte("{")) {
			return s.Targets != nil || json.Unmarshal(line, s) == nil
		}
	}
	return false
}

func TestMain(m *testing.M) { os.Exit(withServers(m.Run)) }

func withServers(run func() int) int {
	root, err := filepath.Abs("../..")
	if err != nil {
		panic(err)
	}
	node := filepath.Join(root, "node_modules", ".bin", "node")
	if _, err := os.Stat(node); err != nil {
		node = "node"
	}
	command := exec.Command(node, filepath.Join(root, "clients", "test-servers.ts"))
	command.Stderr = os.Stderr
	output, err := command.StdoutPipe()
	if err == nil {
		running.commands, err = command.StdinPipe()
	}
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		panic(err)
	}
	running.answers = bufio.NewScanner(output)
	if !running.next() {
		fmt.Fprintln(os.Stderr, "the servers for the tests do not start: has `npm ci` been run?")
		return 1
	}
	code := run()
	running.commands.Close()
	if err := command.Wait(); err != nil {
		fmt.Fprintln(os.Stderr, "the servers for the tests:", err)
		return 1
	}
	return code
}
