package itemcache

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

// Error is what a call fails with. errors.As finds it; errors.Is tells the kinds below apart.
type Error struct {
	Code    codes.Code
	Message string
	// Reason is stable and in UPPER_SNAKE_CASE. Empty when the service did not answer, so did not say.
	Reason string
	// Violations are the broken rules of the request, with INVALID_ARGUMENT.
	Violations []Violation
	// ID is the item that the error is about. Empty: none, or unknown.
	ID string
	// RetryAfter is the time after which a retry makes sense. 0: the service does not say.
	RetryAfter time.Duration
	// Cache tells which tier gave the answer, with NOT_FOUND. nil: unknown.
	Cache *itemcachev1.CacheStatus

	cause error
}

// Violation is one broken rule: Field is the path in the request, as item.tags[3].
type Violation struct {
	Field       string
	Description string
}

// Kind is what errors.Is compares an error with.
type Kind codes.Code

// The kinds of errors that callers tell apart. What others mean is said at their codes in package codes.
const (
	// ErrInvalidArgument: a field breaks a rule; Violations has all of them. Do not retry.
	ErrInvalidArgument = Kind(codes.InvalidArgument)
	// ErrNotFound: every authoritative tier says that the item is absent.
	ErrNotFound = Kind(codes.NotFound)
	// ErrAlreadyExists: the id of a create is taken.
	ErrAlreadyExists = Kind(codes.AlreadyExists)
	// ErrConflict: somebody else was faster (the etag is not the current one). Read again, then write again.
	ErrConflict = Kind(codes.Aborted)
	// ErrOutOfRange: a revision is ahead of everything that was ever written.
	ErrOutOfRange = Kind(codes.OutOfRange)
	// ErrResourceExhausted: too large or too much at once; see RetryAfter.
	ErrResourceExhausted = Kind(codes.ResourceExhausted)
	// ErrUnavailable: the service cannot be reached (Reason is empty), or a tier that it needs is down. Retried already.
	ErrUnavailable = Kind(codes.Unavailable)
	// ErrUnauthenticated: the credential is missing or wrong.
	ErrUnauthenticated = Kind(codes.Unauthenticated)
	// ErrPermissionDenied: the credential does not allow this call.
	ErrPermissionDenied = Kind(codes.PermissionDenied)
	// ErrInternal: a bug. The message has the reference under which the service logged it.
	ErrInternal = Kind(codes.Internal)
)

// Error is the name of the code.
func (k Kind) Error() string { return codes.Code(k).String() }

func (e *Error) Error() string {
	if e.Reason == "" {
		return "itemcache: " + e.Code.String() + ": " + e.Message
	}
	return "itemcache: " + e.Code.String() + " (" + e.Reason + "): " + e.Message
}

// Unwrap is what caused it in this process; nil for what the service says.
func (e *Error) Unwrap() error { return e.cause }

// Is tells whether the error is of this [Kind]. Calls that took too long are context.DeadlineExceeded, and those that their
// caller gave up are context.Canceled; of both, a write may have happened.
func (e *Error) Is(target error) bool {
	switch target {
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	case context.Canceled:
		return e.Code == codes.Canceled
	}
	kind, ok := target.(Kind)
	return ok && codes.Code(kind) == e.Code
}

// GRPCStatus makes status.FromError and status.Code work.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// errorOf makes an *Error of what gRPC returns; nil and io.EOF stay what they are.
func errorOf(err error) error {
	var typed *Error
	if err == nil || err == io.EOF || errors.As(err, &typed) {
		return err
	}
	from := status.Convert(err)
	made := &Error{Code: from.Code(), Message: from.Message()}
	for _, detail := range from.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			made.Reason = detail.GetReason()
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				made.Violations = append(made.Violations, Violation{violation.GetField(), violation.GetDescription()})
			}
		case *errdetails.ResourceInfo:
			made.ID = detail.GetResourceName()
		case *errdetails.RetryInfo:
			made.RetryAfter = detail.GetRetryDelay().AsDuration()
		case *itemcachev1.CacheStatus:
			made.Cache = detail
		}
	}
	return made
}

// itemError is what one item of a batch failed with.
func itemError(result *itemcachev1.BatchGetItemsResult) error {
	failed := result.GetError()
	return &Error{
		Code:       codes.Code(failed.GetCode()),
		Message:    failed.GetMessage(),
		Reason:     failed.GetReason(),
		ID:         result.GetId(),
		RetryAfter: failed.GetRetryDelay().AsDuration(),
		Cache:      result.GetCache(),
	}
}
