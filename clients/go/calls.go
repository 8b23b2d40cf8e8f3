package itemcache

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

const (
	// The most ids that one BatchGetItems may name.
	batchIDs = 500
	// Batches of one GetMany that are under way at once: enough to keep a connection busy.
	batchesAtOnce = 4
)

// Freshness chooses the tiers that may answer a read.
type Freshness = itemcachev1.Freshness

const (
	// FreshnessDefault: any current copy, from the nearest tier.
	FreshnessDefault = itemcachev1.Freshness_FRESHNESS_DEFAULT
	// CacheOnly: memory and Redis; when neither holds a copy, the answer has no item.
	CacheOnly = itemcachev1.Freshness_FRESHNESS_CACHE_ONLY
	// Fresh: the database is asked.
	Fresh = itemcachev1.Freshness_FRESHNESS_FRESH
)

// ReadOptions say how fresh an answer must be, and what of it is wanted. The zero value of each is its default.
type ReadOptions struct {
	// Freshness is FreshnessDefault unless set.
	Freshness Freshness
	// MinRevision asks for the state at this revision or a later one: to read one's own write, give the revision that it
	// returned. Default: none.
	MinRevision int64
	// MaxStaleness: a copy that was checked against the database longer ago is reloaded. Default: no bound but the service's.
	MaxStaleness time.Duration
	// NoStale refuses copies past their freshness, which may otherwise be served while they are reloaded.
	NoStale bool
	// Fields of the item to return, as title or price.units. Default: all.
	Fields []string
	// IfNoneMatch (Get only) is the etag of the copy that the caller has: when it is current, no item is sent.
	IfNoneMatch string
}

func (o *ReadOptions) message() *itemcachev1.ReadOptions {
	message := &itemcachev1.ReadOptions{Freshness: o.Freshness, MinRevision: o.MinRevision}
	if o.MaxStaleness != 0 {
		message.MaxStaleness = durationpb.New(o.MaxStaleness)
	}
	if o.NoStale {
		message.AllowStale = proto.Bool(false)
	}
	return message
}

// GetResult is the answer to one look-up.
type GetResult struct {
	// Item is nil only when NotModified, and for a miss with CacheOnly. An absent item is ErrNotFound.
	Item        *itemcachev1.Item
	NotModified bool
	// Cache tells where the answer came from.
	Cache *itemcachev1.CacheStatus
	// Revision: the answer is the tenant's state at this revision.
	Revision int64
}

// Get returns one item; ErrNotFound when it is absent. options may be nil.
func (c *Client) Get(ctx context.Context, id string, options *ReadOptions) (*GetResult, error) {
	options = orZero(options)
	answer, err := c.service.GetItem(ctx, &itemcachev1.GetItemRequest{
		Id:          id,
		Options:     options.message(),
		ReadMask:    fieldMask(options.Fields),
		IfNoneMatch: options.IfNoneMatch,
	})
	if err != nil {
		return nil, err
	}
	return &GetResult{
		Item:        answer.GetItem(),
		NotModified: answer.GetNotModified(),
		Cache:       answer.GetCache(),
		Revision:    answer.GetRevision(),
	}, nil
}

// ManyResult is the answer for one id: an item, or what Get would have failed with. Neither: a miss with CacheOnly.
type ManyResult struct {
	Item *itemcachev1.Item
	// Err is an *Error or nil.
	Err error
	// Cache tells where the answer came from; nil with an error that no tier gave.
	Cache *itemcachev1.CacheStatus
}

// GetMany returns any number of items by their ids. An item that is missing or slow fails alone, with an Err in its result.
// They are asked for in batches of 500, each with a default deadline of its own; a batch that fails as a whole fails the call.
// options may be nil.
func (c *Client) GetMany(ctx context.Context, ids []string, options *ReadOptions) (map[string]ManyResult, error) {
	options = orZero(options)
	results := make(map[string]ManyResult, len(ids))
	distinct := make([]string, 0, len(ids))
	for _, id := range ids {
		if _, known := results[id]; !known {
			results[id] = ManyResult{Err: &Error{Code: codes.Internal, Message: "the service did not answer for this id", ID: id}}
			distinct = append(distinct, id)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		group sync.WaitGroup
		lock  sync.Mutex
		slots = make(chan struct{}, batchesAtOnce)
		first error
	)
	for begin := 0; begin < len(distinct); begin += batchIDs {
		batch := distinct[begin:min(begin+batchIDs, len(distinct))]
		slots <- struct{}{}
		group.Add(1)
		go func() {
			defer group.Done()
			defer func() { <-slots }()
			answer, err := c.service.BatchGetItems(ctx, &itemcachev1.BatchGetItemsRequest{
				Ids:      batch,
				Options:  options.message(),
				ReadMask: fieldMask(options.Fields),
			})
			lock.Lock()
			defer lock.Unlock()
			if err != nil {
				// When one batch fails, the others are of no use any more.
				if first == nil {
					first = err
					cancel(err)
				}
				return
			}
			for _, result := range answer.GetResults() {
				results[result.GetId()] = manyResult(result)
			}
		}()
	}
	group.Wait()
	if first != nil {
		return nil, first
	}
	return results, nil
}

func manyResult(result *itemcachev1.BatchGetItemsResult) ManyResult {
	if result.GetError() != nil {
		return ManyResult{Err: itemError(result), Cache: result.GetCache()}
	}
	return ManyResult{Item: result.GetItem(), Cache: result.GetCache()}
}

// CreateOptions say how an item is created.
type CreateOptions struct {
	// RequestID: a call with the same one within 24 h returns the first outcome instead of writing again. Default: a random
	// one for each call, so that the client's own retries are safe. Give one to make a retry of yours safe, too.
	RequestID string
}

// UpdateOptions say what of an item is changed. The zero value of each is its default.
type UpdateOptions struct {
	// Fields to change; one that is not set in the item is cleared; *: all. Default: those set in the item.
	Fields []string
	// AllowMissing: create the item when it is absent. Default: ErrNotFound.
	AllowMissing bool
	// RequestID: as that of CreateOptions.
	RequestID string
}

// DeleteOptions say under which conditions an item is deleted. The zero value of each is its default.
type DeleteOptions struct {
	// Etag: ErrConflict when it is not the item's current one. Default: not compared.
	Etag string
	// AllowMissing: an absent item is a success. Default: ErrNotFound.
	AllowMissing bool
	// RequestID: as that of CreateOptions.
	RequestID string
}

// WriteResult is an item as it was stored.
type WriteResult struct {
	Item     *itemcachev1.Item
	Revision int64
}

// Create creates an item. ErrAlreadyExists when the id is taken, also by an item of the origin. options may be nil.
func (c *Client) Create(ctx context.Context, item *itemcachev1.Item, options *CreateOptions) (*WriteResult, error) {
	options = orZero(options)
	answer, err := c.service.CreateItem(ctx, &itemcachev1.CreateItemRequest{Item: item, RequestId: options.RequestID})
	if err != nil {
		return nil, err
	}
	return &WriteResult{Item: answer.GetItem(), Revision: answer.GetRevision()}, nil
}

// Update changes an item, or the part of it that Fields names. When the item carries an etag, as one that was read does, and
// somebody has changed it since: ErrConflict. options may be nil.
func (c *Client) Update(ctx context.Context, item *itemcachev1.Item, options *UpdateOptions) (*WriteResult, error) {
	options = orZero(options)
	answer, err := c.service.UpdateItem(ctx, &itemcachev1.UpdateItemRequest{
		Item:         item,
		UpdateMask:   fieldMask(options.Fields),
		AllowMissing: options.AllowMissing,
		RequestId:    options.RequestID,
	})
	if err != nil {
		return nil, err
	}
	return &WriteResult{Item: answer.GetItem(), Revision: answer.GetRevision()}, nil
}

// Delete deletes an item, and returns the revision of that. It stays deleted, whatever the origin says. ErrNotFound when it
// is absent. options may be nil.
func (c *Client) Delete(ctx context.Context, id string, options *DeleteOptions) (int64, error) {
	options = orZero(options)
	answer, err := c.service.DeleteItem(ctx, &itemcachev1.DeleteItemRequest{
		Id:           id,
		Etag:         options.Etag,
		AllowMissing: options.AllowMissing,
		RequestId:    options.RequestID,
	})
	return answer.GetRevision(), err
}

// Invalidation is what is invalidated, and how. One of IDs, Tags and All is given.
type Invalidation struct {
	// IDs of items: 1 to 500.
	IDs []string
	// Tags or categories: 1 to 32; every item with one of them.
	Tags []string
	// All: every item of the tenant.
	All bool
	// Remove: the old copies may not be served at all, not even as stale while they are reloaded.
	Remove bool
	// RefreshOrigin also fetches the items from the origin again. Only with IDs, at most 100.
	RefreshOrigin bool
	// RequestID: as that of CreateOptions.
	RequestID string
}

// Invalidate makes every cache distrust the copies that it holds of the named items, and returns the revision of that.
func (c *Client) Invalidate(ctx context.Context, what Invalidation) (int64, error) {
	request := &itemcachev1.InvalidateItemsRequest{
		Mode:          itemcachev1.InvalidationMode_INVALIDATION_MODE_EXPIRE,
		RefreshOrigin: what.RefreshOrigin,
		RequestId:     what.RequestID,
	}
	if what.Remove {
		request.Mode = itemcachev1.InvalidationMode_INVALIDATION_MODE_REMOVE
	}
	switch {
	case what.All && what.IDs == nil && what.Tags == nil:
		request.Target = &itemcachev1.InvalidateItemsRequest_All{All: true}
	case what.IDs != nil && what.Tags == nil && !what.All:
		request.Target = &itemcachev1.InvalidateItemsRequest_Ids{Ids: &itemcachev1.ItemIds{Ids: what.IDs}}
	case what.Tags != nil && what.IDs == nil && !what.All:
		request.Target = &itemcachev1.InvalidateItemsRequest_Tags{Tags: &itemcachev1.ItemTags{Tags: what.Tags}}
	default:
		return 0, invalidOption("one of IDs, Tags and All says what is invalidated")
	}
	answer, err := c.service.InvalidateItems(ctx, request)
	return answer.GetRevision(), err
}

func fieldMask(fields []string) *fieldmaskpb.FieldMask {
	if fields == nil {
		return nil
	}
	return &fieldmaskpb.FieldMask{Paths: fields}
}

func orZero[T any](options *T) *T {
	if options == nil {
		return new(T)
	}
	return options
}
