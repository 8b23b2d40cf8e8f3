package itemcache

import (
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

// WatchOptions say what is watched. The zero value of each is its default.
type WatchOptions struct {
	// ResumeAfter continues exactly after this revision. ErrOutOfRange when it is ahead of the log. Default: begin now.
	ResumeAfter *int64
	// IDs: only events that may concern one of these, at most 500. Default, with no Tags: all.
	IDs []string
	// Tags: only events that may concern one of these tags or categories, at most 32.
	Tags []string
	// IncludeItems: events of kind UPSERTED carry their items.
	IncludeItems bool
	// Heartbeat is the time between heartbeats: 100 ms to 1 min. Default: 500 ms.
	Heartbeat time.Duration
	// MaxBatchDelay is how long events may wait to be sent together: up to 1 s. Default: 0.
	MaxBatchDelay time.Duration
	// ExcludeOwnWrites leaves out what clients with this client's ClientID write.
	ExcludeOwnWrites bool
}

// Message is what a watch yields: [Started], [Event], [Heartbeat], [Gap], [Disconnected] or [Resumed].
type Message interface{ isMessage() }

// Started comes first: events after Position follow.
type Started struct{ Position, OldestResumable int64 }

// Event is one row of the tenant's log. A kind that this release does not know might concern anything, so it comes as
// TENANT_INVALIDATED.
type Event struct{ *itemcachev1.InvalidationEvent }

// Heartbeat says that everything up to Revision has been yielded: it can be given as ResumeAfter.
type Heartbeat struct {
	Revision int64
	// HeardAt: what was committed before this time, by this process's own monotonic clock, has been yielded, or named by a
	// Gap. The zero time when the service does not say.
	HeardAt time.Time
}

// Gap says that the revisions after After up to Through are lost: distrust every copy older than Through.
type Gap struct{ After, Through int64 }

// Disconnected says that the stream is lost, or cannot be had yet. The watch goes on trying, and Resumed, or Started if it
// has not come yet, follows when it has succeeded.
type Disconnected struct{ Err error }

// Resumed says that the watch goes on after this revision.
type Resumed struct{ After int64 }

func (Started) isMessage()      {}
func (Event) isMessage()        {}
func (Heartbeat) isMessage()    {}
func (Gap) isMessage()          {}
func (Disconnected) isMessage() {}
func (Resumed) isMessage()      {}

const (
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
	// A stream from which nothing has come for so many heartbeats, and so long, is taken for dead.
	silentHeartbeats = 5
	minSilence       = 2 * time.Second
	firstSilence     = 10 * time.Second
)

var (
	errBrokenOff = errors.New("the consumer has broken off")
	errSilent    = &Error{Code: codes.Unavailable, Message: "nothing has come for too long"}
	errEnded     = &Error{Code: codes.Unavailable, Message: "the stream has ended"}
)

// Watch yields the tenant's invalidations, in order, each once. It resumes by itself after whatever breaks the connection, on
// any instance: see Disconnected and Resumed. What the service no longer holds is a Gap. A consumer that is slow slows the
// stream down and loses nothing within the service's retention.
//
// It ends when the consumer breaks off, or with one error: context.Canceled by ctx or by Close, ErrOutOfRange when ResumeAfter
// is ahead of the log, or what no retry would help against. The revision of an Event, a Heartbeat or the Through of a Gap can
// be kept and given as ResumeAfter later, also in another process. Each range over the sequence is a watch of its own.
func (c *Client) Watch(ctx context.Context, options *WatchOptions) iter.Seq2[Message, error] {
	options = orZero(options)
	return func(yield func(Message, error) bool) {
		follower := &follower{
			client: c,
			yield:  func(message Message) bool { return yield(message, nil) },
			dense:  len(options.IDs) == 0 && len(options.Tags) == 0 && !options.ExcludeOwnWrites,
			request: &itemcachev1.WatchInvalidationsRequest{
				Ids:               options.IDs,
				Tags:              options.Tags,
				HeartbeatInterval: orUnset(options.Heartbeat),
				MaxBatchDelay:     orUnset(options.MaxBatchDelay),
				IncludeItems:      options.IncludeItems,
				ClientId:          c.clientID,
				ExcludeOwnWrites:  options.ExcludeOwnWrites,
			},
		}
		if options.ResumeAfter != nil {
			follower.request.ResumeAfter = proto.Int64(*options.ResumeAfter)
		}
		if err := follower.follow(ctx); err != errBrokenOff {
			yield(nil, err)
		}
	}
}

// follower holds what a watch knows from stream to stream. The cursor is request.ResumeAfter: the revision up to which
// everything has been yielded, nil until there is one.
type follower struct {
	client      *Client
	yield       func(Message) bool
	request     *itemcachev1.WatchInvalidationsRequest
	dense       bool
	started     bool
	established bool
	failures    int
	silence     time.Duration
}

// follow returns errBrokenOff, or why it cannot go on.
func (f *follower) follow(ctx context.Context) error {
	for {
		f.established = false
		err := f.stream(ctx)
		if err == errBrokenOff {
			return err
		}
		if ctx.Err() != nil {
			return &Error{Code: codes.Canceled, Message: "the watch was cancelled", cause: context.Cause(ctx)}
		}
		if f.client.isClosed() {
			return errClosed
		}
		if !f.established && !isWorthARetry(err, f.started) {
			return err
		}
		if (f.established || f.failures == 0) && !f.yield(Disconnected{err}) {
			return errBrokenOff
		}
		backoff := min(maxBackoff, firstBackoff<<min(f.failures, 10))
		f.failures++
		select {
		case <-time.After(time.Duration(rand.Float64() * float64(backoff))):
		case <-ctx.Done():
		}
	}
}

// stream follows one stream until it ends. It never returns nil.
func (f *follower) stream(ctx context.Context) error {
	f.client.ready(ctx)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.silence = firstSilence
	// Silence counts only while somebody waits.
	timer := time.AfterFunc(f.silence, func() { cancel(errSilent) })
	defer timer.Stop()
	began := time.Now()
	stream, err := f.client.service.WatchInvalidations(ctx, f.request)
	for err == nil {
		var message *itemcachev1.WatchInvalidationsResponse
		timer.Reset(f.silence)
		message, err = stream.Recv()
		timer.Stop()
		if err == nil {
			err = f.received(message, began)
		}
	}
	switch {
	case err == io.EOF:
		return errEnded
	case err != errBrokenOff && context.Cause(ctx) == errSilent:
		return errSilent
	}
	return err
}

func (f *follower) received(message *itemcachev1.WatchInvalidationsResponse, began time.Time) error {
	ok := true
	switch event := message.GetEvent().(type) {
	case *itemcachev1.WatchInvalidationsResponse_Started:
		position := event.Started.GetPosition()
		f.established = true
		f.failures = 0
		f.silence = max(minSilence, silentHeartbeats*event.Started.GetHeartbeatInterval().AsDuration())
		if f.request.ResumeAfter == nil {
			f.request.ResumeAfter = proto.Int64(position)
		}
		if f.started {
			ok = f.yield(Resumed{position})
		} else {
			ok = f.yield(Started{position, event.Started.GetOldestResumable()})
		}
		f.started = true
	case *itemcachev1.WatchInvalidationsResponse_Batch:
		for _, row := range event.Batch.GetEvents() {
			if row.GetRevision() <= f.cursor() {
				continue
			}
			if !f.advance(row.GetRevision(), row.GetRevision()-1) || !f.yield(Event{known(row)}) {
				return errBrokenOff
			}
		}
	case *itemcachev1.WatchInvalidationsResponse_Heartbeat:
		heartbeat := event.Heartbeat
		if heartbeat.GetRevision() > f.cursor() {
			ok = f.advance(heartbeat.GetRevision(), heartbeat.GetRevision())
		}
		var heardAt time.Time
		if heartbeat.GetHeardAfter() != nil {
			heardAt = began.Add(heartbeat.GetHeardAfter().AsDuration())
		}
		ok = ok && f.yield(Heartbeat{f.cursor(), heardAt})
	case *itemcachev1.WatchInvalidationsResponse_Gap:
		if event.Gap.GetThrough() > f.cursor() {
			f.request.ResumeAfter = proto.Int64(event.Gap.GetThrough())
			ok = f.yield(Gap{event.Gap.GetAfter(), event.Gap.GetThrough()})
		}
	case *itemcachev1.WatchInvalidationsResponse_Draining:
		// UNAVAILABLE follows; another instance can have the watch at once.
	}
	if !ok {
		return errBrokenOff
	}
	return nil
}

func (f *follower) cursor() int64 { return f.request.GetResumeAfter() }

// advance moves the cursor to revision. Where every revision should have come, those up to through that have not are a gap.
func (f *follower) advance(revision, through int64) bool {
	after := f.cursor()
	f.request.ResumeAfter = proto.Int64(revision)
	return !f.dense || through <= after || f.yield(Gap{after, through})
}

func known(row *itemcachev1.InvalidationEvent) *itemcachev1.InvalidationEvent {
	if _, ok := itemcachev1.InvalidationKind_name[int32(row.GetKind())]; !ok || row.GetKind() == 0 {
		row.Kind = itemcachev1.InvalidationKind_INVALIDATION_KIND_TENANT_INVALIDATED
	}
	if row.GetMode() != itemcachev1.InvalidationMode_INVALIDATION_MODE_EXPIRE {
		row.Mode = itemcachev1.InvalidationMode_INVALIDATION_MODE_REMOVE
	}
	return row
}

// isWorthARetry: once a watch has begun, too many watchers on an instance is as much a reason to try another as its end, and
// a token that cannot be had now may be had later.
func isWorthARetry(err error, started bool) bool {
	var failed *Error
	if !errors.As(err, &failed) {
		return false
	}
	switch failed.Code {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted:
		return started
	case codes.Unauthenticated:
		return started && failed.Reason == "NO_TOKEN"
	case codes.Internal, codes.Unknown, codes.DeadlineExceeded:
		// What the service itself says has a reason; without one a connection broke.
		return failed.Reason == ""
	}
	return false
}

func orUnset(duration time.Duration) *durationpb.Duration {
	if duration == 0 {
		return nil
	}
	return durationpb.New(duration)
}
