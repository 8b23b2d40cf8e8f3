package itemcache_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	itemcache "github.com/itemcache/itemcache/clients/go"
	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

// following gives the messages of a watch one by one, and checks that revisions come in order, each once, none left out.
type following struct {
	t       *testing.T
	next    func() (itemcache.Message, error, bool)
	last    int64
	resumed int
}

func follow(t *testing.T, watch iter.Seq2[itemcache.Message, error]) *following {
	next, stop := iter.Pull2(watch)
	t.Cleanup(stop)
	return &following{t: t, next: next}
}

// until reads messages up to the event with this revision; up to the beginning when that is later.
func (f *following) until(revision int64) {
	f.t.Helper()
	for f.last < revision {
		message, err, ok := f.next()
		if err != nil || !ok {
			f.t.Fatalf("the watch ended before %d: %v", revision, err)
		}
		switch message := message.(type) {
		case itemcache.Started:
			f.last = message.Position
		case itemcache.Resumed:
			f.resumed++
		case itemcache.Gap:
			f.t.Fatalf("a gap where nothing is missing: %v", message)
		case itemcache.Heartbeat:
			if message.Revision != f.last || message.HeardAt.IsZero() {
				f.t.Fatalf("after %d came the heartbeat %v", f.last, message)
			}
		case itemcache.Event:
			if message.GetRevision() != f.last+1 {
				f.t.Fatalf("after %d came %d", f.last, message.GetRevision())
			}
			f.last = message.GetRevision()
		}
	}
}

// write changes an item until that has succeeded, and returns the revision of it.
func write(t *testing.T, client *itemcache.Client, title string) int64 {
	t.Helper()
	options := &itemcache.UpdateOptions{AllowMissing: true, RequestID: "write-" + title}
	for end := time.Now().Add(60 * time.Second); ; {
		written, err := client.Update(t.Context(), &itemcachev1.Item{Id: "x", Title: title}, options)
		if err == nil {
			return written.Revision
		}
		// Without a reason it is not the service that said so, but the way to it that broke.
		var failed *itemcache.Error
		nobodyAnswered := errors.As(err, &failed) && failed.Reason == ""
		if !(nobodyAnswered || errors.Is(err, itemcache.ErrUnavailable)) || time.Now().After(end) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestAWatchSurvivesTheDeathOfItsServersInOrderAndEachRevisionOnce(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	client := connect(t, itemcache.Options{})
	watch := follow(t, client.Watch(ctx, &itemcache.WatchOptions{Heartbeat: 100 * time.Millisecond}))
	watch.until(1)
	watch.until(write(t, client, "both live"))
	running.do(t, "kill 0")
	watch.until(write(t, client, "only the second lives"))
	running.do(t, "start 0")
	running.do(t, "kill 1")
	watch.until(write(t, client, "only the first lives"))
	if watch.resumed == 0 {
		t.Error("the watch was on neither server")
	}
	running.do(t, "kill 0")
	running.do(t, "start 0")
	running.do(t, "start 1")
	// Whatever is written while the watch is away comes when it is back.
	for i := range 20 {
		write(t, client, fmt.Sprint("number ", i))
	}
	watch.until(write(t, client, "the last"))
}

func TestAWatchResumesAfterAnyBookmarkAlsoInAnotherClient(t *testing.T) {
	client := connect(t, itemcache.Options{})
	first := write(t, client, "1")
	last := first
	for i := range 5 {
		last = write(t, client, fmt.Sprint(i+2))
	}
	other := follow(t, connect(t, itemcache.Options{}).Watch(t.Context(), &itemcache.WatchOptions{ResumeAfter: &first}))
	other.last = first
	other.until(last)
}

func TestAWatchBringsInvalidationsAndLeavesOutOnesOwnWritesIfAsked(t *testing.T) {
	mine, other := connect(t, itemcache.Options{ClientID: "me"}), connect(t, itemcache.Options{ClientID: "other"})
	before := write(t, other, "1")
	write(t, mine, "2")
	revision := must(other.Invalidate(t.Context(), itemcache.Invalidation{Tags: []string{"new"}, Remove: true}))
	for message, err := range mine.Watch(t.Context(), &itemcache.WatchOptions{ResumeAfter: &before, ExcludeOwnWrites: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if event, ok := message.(itemcache.Event); ok {
			if event.GetRevision() != revision || event.GetClientId() != "other" || event.GetTags()[0] != "new" ||
				event.GetKind() != itemcachev1.InvalidationKind_INVALIDATION_KIND_TAGS_INVALIDATED ||
				event.GetMode() != itemcachev1.InvalidationMode_INVALIDATION_MODE_REMOVE {
				t.Errorf("the first event of others is %v", event)
			}
			break
		}
	}
}

func TestAWatchEndsWithAnErrorWhenNoRetryWouldHelp(t *testing.T) {
	ends := func(client *itemcache.Client, ctx context.Context, options *itemcache.WatchOptions, act func()) error {
		for message, err := range client.Watch(ctx, options) {
			if err != nil {
				return err
			}
			if _, ok := message.(itemcache.Started); ok {
				act()
			}
		}
		return nil
	}
	client := connect(t, itemcache.Options{})
	future := int64(1 << 60)
	if err := ends(client, t.Context(), &itemcache.WatchOptions{ResumeAfter: &future}, func() {}); !errors.Is(err, itemcache.ErrOutOfRange) {
		t.Errorf("a bookmark ahead of the log: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := ends(client, ctx, nil, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled watch: %v", err)
	}
	if err := ends(client, t.Context(), nil, func() { client.Close() }); !errors.Is(err, context.Canceled) {
		t.Errorf("a closed client: %v", err)
	}
}

// scripted is a server that says what a healthy service never says: one script for each stream, in order.
type scripted struct {
	itemcachev1.UnimplementedItemCacheServiceServer
	scripts []func(*itemcachev1.WatchInvalidationsRequest, func(*itemcachev1.WatchInvalidationsResponse)) error
	streams int
}

func (s *scripted) WatchInvalidations(request *itemcachev1.WatchInvalidationsRequest, stream grpc.ServerStreamingServer[itemcachev1.WatchInvalidationsResponse]) error {
	s.streams++
	return s.scripts[s.streams-1](request, func(message *itemcachev1.WatchInvalidationsResponse) { _ = stream.Send(message) })
}

// startedAt begins a stream. With a heartbeat of a minute it is not taken for dead, however slow the machine is.
func startedAt(position int64, heartbeat time.Duration) *itemcachev1.WatchInvalidationsResponse {
	return &itemcachev1.WatchInvalidationsResponse{Event: &itemcachev1.WatchInvalidationsResponse_Started{
		Started: &itemcachev1.InvalidationsStarted{Position: position, HeartbeatInterval: durationpb.New(heartbeat)},
	}}
}

func batch(revisions ...int64) *itemcachev1.WatchInvalidationsResponse {
	events := &itemcachev1.InvalidationsBatch{}
	for _, revision := range revisions {
		events.Events = append(events.Events, &itemcachev1.InvalidationEvent{Revision: revision, Kind: 99})
	}
	return &itemcachev1.WatchInvalidationsResponse{Event: &itemcachev1.WatchInvalidationsResponse_Batch{Batch: events}}
}

func TestATokenThatCannotBeHadEndsAWatchThatBeginsAndNotOneThatGoesOn(t *testing.T) {
	server := grpc.NewServer()
	t.Cleanup(server.Stop)
	itemcachev1.RegisterItemCacheServiceServer(server, &scripted{scripts: []func(*itemcachev1.WatchInvalidationsRequest, func(*itemcachev1.WatchInvalidationsResponse)) error{
		func(_ *itemcachev1.WatchInvalidationsRequest, send func(*itemcachev1.WatchInvalidationsResponse)) error {
			send(startedAt(10, time.Minute))
			return status.Error(codes.Unavailable, "gone")
		},
		func(_ *itemcachev1.WatchInvalidationsRequest, send func(*itemcachev1.WatchInvalidationsResponse)) error {
			send(startedAt(10, time.Minute))
			return nil
		},
	}})
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	go func() { _ = server.Serve(listener) }()
	asked := 0
	token := func(context.Context) (string, error) {
		if asked++; asked%2 == 1 {
			return "", errors.New("no network")
		}
		return "t", nil
	}
	client := must(itemcache.Connect(listener.Addr().String(), &itemcache.Options{Token: token}))
	t.Cleanup(func() { client.Close() })
	for message, err := range client.Watch(t.Context(), nil) {
		var failed *itemcache.Error
		if !errors.As(err, &failed) || failed.Reason != "NO_TOKEN" {
			t.Errorf("without a token the watch yields %v, %v", message, err)
		}
	}
	var seen []string
	for message, err := range client.Watch(t.Context(), nil) {
		seen = append(seen, fmt.Sprintf("%T", message))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := message.(itemcache.Resumed); ok {
			break
		}
	}
	if want := []string{"itemcache.Started", "itemcache.Disconnected", "itemcache.Resumed"}; !slices.Equal(seen, want) {
		t.Errorf("the watch yielded %v instead of %v", seen, want)
	}
}

func TestAWatchThatCannotConnectSaysWhy(t *testing.T) {
	client := must(itemcache.Connect("127.0.0.1:1", nil))
	t.Cleanup(func() { client.Close() })
	for message, err := range client.Watch(t.Context(), nil) {
		if lost, ok := message.(itemcache.Disconnected); !ok || !strings.Contains(lost.Err.Error(), "connection refused") {
			t.Errorf("the watch yielded %v, %v", message, err)
		}
		break
	}
}

func TestAWatchNamesWhatIsMissingAndLeavesOutWhatComesTwice(t *testing.T) {
	type send = func(*itemcachev1.WatchInvalidationsResponse)
	server := grpc.NewServer()
	t.Cleanup(server.Stop)
	silent := make(chan struct{})
	t.Cleanup(func() { close(silent) })
	itemcachev1.RegisterItemCacheServiceServer(server, &scripted{scripts: []func(*itemcachev1.WatchInvalidationsRequest, send) error{
		func(_ *itemcachev1.WatchInvalidationsRequest, send send) error {
			send(startedAt(10, time.Minute))
			send(batch(11, 12, 12, 15))
			send(&itemcachev1.WatchInvalidationsResponse{Event: &itemcachev1.WatchInvalidationsResponse_Heartbeat{
				Heartbeat: &itemcachev1.InvalidationsHeartbeat{Revision: 17},
			}})
			return status.Error(codes.Internal, "reset")
		},
		func(request *itemcachev1.WatchInvalidationsRequest, send send) error {
			if request.GetResumeAfter() != 17 {
				return status.Error(codes.InvalidArgument, fmt.Sprint("resumed after ", request.GetResumeAfter()))
			}
			send(startedAt(17, time.Minute))
			send(&itemcachev1.WatchInvalidationsResponse{Event: &itemcachev1.WatchInvalidationsResponse_Gap{
				Gap: &itemcachev1.InvalidationsGap{After: 17, Through: 20},
			}})
			send(batch(20, 21))
			return nil
		},
		// Begins, and is silent for ever: the watch must give it up.
		func(_ *itemcachev1.WatchInvalidationsRequest, send send) error {
			send(startedAt(21, 100*time.Millisecond))
			<-silent
			return nil
		},
		func(_ *itemcachev1.WatchInvalidationsRequest, send send) error {
			send(startedAt(21, time.Minute))
			return status.Error(codes.Unavailable, "gone")
		},
		func(*itemcachev1.WatchInvalidationsRequest, send) error {
			return status.Error(codes.PermissionDenied, "withdrawn")
		},
	}})
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	go func() { _ = server.Serve(listener) }()
	client := must(itemcache.Connect(listener.Addr().String(), &itemcache.Options{Timeout: patience}))
	t.Cleanup(func() { client.Close() })
	// So there is a connection when the watch begins.
	if _, err := client.Get(t.Context(), "x", nil); status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}

	var seen []string
	for message, err := range client.Watch(t.Context(), nil) {
		switch message := message.(type) {
		case itemcache.Event:
			seen = append(seen, fmt.Sprint(message.GetRevision()))
			if message.GetKind() != itemcachev1.InvalidationKind_INVALIDATION_KIND_TENANT_INVALIDATED {
				t.Errorf("an unknown kind is %v", message.GetKind())
			}
		case itemcache.Gap:
			seen = append(seen, fmt.Sprint("gap ", message.After, "-", message.Through))
		case itemcache.Heartbeat:
			seen = append(seen, fmt.Sprint("heartbeat ", message.Revision))
		case itemcache.Disconnected:
			seen = append(seen, "disconnected")
		case itemcache.Resumed:
			seen = append(seen, "resumed")
		case itemcache.Started:
			seen = append(seen, "started")
		}
		if err != nil && !errors.Is(err, itemcache.ErrPermissionDenied) {
			t.Errorf("the watch ended with %v", err)
		}
	}
	want := strings.Split("started,11,12,gap 12-14,15,gap 15-17,heartbeat 17,disconnected,resumed,gap 17-20,21,disconnected,resumed,disconnected,resumed,disconnected", ",")
	if !slices.Equal(seen, want) {
		t.Errorf("the watch yielded\n%v instead of\n%v", seen, want)
	}
}
