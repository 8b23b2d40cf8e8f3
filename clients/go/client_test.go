package itemcache_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	itemcache "github.com/itemcache/itemcache/clients/go"
	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

// A busy machine may be slow; none of these tests is about time.
const patience = 20 * time.Second

func connect(t *testing.T, options itemcache.Options) *itemcache.Client {
	t.Helper()
	if options.Timeout == 0 {
		options.Timeout = patience
	}
	if options.Tenant == "" {
		options.Tenant = strings.ReplaceAll(t.Name(), "/", "-")
	}
	client, err := itemcache.Connect(running.target(), &options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func TestAClientReadsWhatItWritesOnEveryServerAndSeesWhereItCameFrom(t *testing.T) {
	client, ctx := connect(t, itemcache.Options{}), t.Context()
	created := must(client.Create(ctx, &itemcachev1.Item{Id: "lamp", Title: "Lamp", Tags: []string{"new"}}, nil))
	updated := must(client.Update(ctx, &itemcachev1.Item{Id: "lamp", Title: "Brass lamp"}, nil))
	if updated.Revision <= created.Revision || updated.Item.GetTags()[0] != "new" {
		t.Errorf("after %v came %v", created, updated)
	}
	for range 4 {
		read := must(client.Get(ctx, "lamp", &itemcache.ReadOptions{MinRevision: updated.Revision}))
		if read.Item.GetTitle() != "Brass lamp" || read.Revision < updated.Revision {
			t.Errorf("read %v", read)
		}
		if read.Cache.GetTier() == 0 || read.Cache.GetOutcome() == 0 || read.Cache.GetAsOf() < updated.Revision {
			t.Errorf("came from %v", read.Cache)
		}
	}
	same := must(client.Get(ctx, "lamp", &itemcache.ReadOptions{
		IfNoneMatch: updated.Item.GetEtag(),
		MinRevision: updated.Revision,
	}))
	if !same.NotModified || same.Item != nil {
		t.Errorf("the etag that is current brought %v", same)
	}
	fresh := must(client.Get(ctx, "lamp", &itemcache.ReadOptions{Freshness: itemcache.Fresh, Fields: []string{"title"}}))
	if fresh.Cache.GetTier() != itemcachev1.Tier_TIER_POSTGRES || fresh.Item.GetId() != "" {
		t.Errorf("fresh and cut to the title: %v", fresh)
	}
	if _, err := client.Delete(ctx, "lamp", &itemcache.DeleteOptions{Etag: updated.Item.GetEtag()}); err != nil {
		t.Error(err)
	}
}

func TestGetManyAnswersAnyNumberOfIdsByTheirId(t *testing.T) {
	client, ctx := connect(t, itemcache.Options{}), t.Context()
	revision := must(client.Create(ctx, &itemcachev1.Item{Id: "one", Title: "One"}, nil)).Revision
	ids := []string{"one", "one"}
	for i := range 1200 {
		ids = append(ids, fmt.Sprintf("absent-%d", i))
	}
	results := must(client.GetMany(ctx, ids, &itemcache.ReadOptions{MinRevision: revision}))
	if len(results) != 1201 {
		t.Errorf("%d results", len(results))
	}
	if one := results["one"]; one.Err != nil || one.Item.GetTitle() != "One" || one.Cache.GetTier() == 0 {
		t.Errorf("one is %v", one)
	}
	var failed *itemcache.Error
	absent := results["absent-1199"]
	if !errors.Is(absent.Err, itemcache.ErrNotFound) || !errors.As(absent.Err, &failed) || failed.ID != "absent-1199" {
		t.Errorf("an absent one is %v", absent)
	}
	if _, err := client.GetMany(ctx, append(ids, ""), nil); !errors.Is(err, itemcache.ErrInvalidArgument) {
		t.Errorf("a batch that breaks a rule: %v", err)
	}
}

func TestErrorsSayWhatTheServiceSays(t *testing.T) {
	client, ctx := connect(t, itemcache.Options{}), t.Context()
	_, err := client.Get(ctx, "absent", nil)
	var failed *itemcache.Error
	if !errors.Is(err, itemcache.ErrNotFound) || !errors.As(err, &failed) || failed.ID != "absent" ||
		failed.Reason != "ITEM_NOT_FOUND" || failed.Cache.GetTier() == 0 || status.Code(err) != codes.NotFound {
		t.Errorf("absent: %#v", err)
	}
	_, err = client.Create(ctx, &itemcachev1.Item{Id: "x", Tags: []string{"", strings.Repeat("t", 65)}}, nil)
	if !errors.Is(err, itemcache.ErrInvalidArgument) || !errors.As(err, &failed) || len(failed.Violations) != 2 ||
		failed.Violations[1].Field != "item.tags[1]" {
		t.Errorf("two broken rules: %#v", err)
	}
	item := must(client.Create(ctx, &itemcachev1.Item{Id: "x"}, nil)).Item
	if _, err = client.Create(ctx, &itemcachev1.Item{Id: "x"}, nil); !errors.Is(err, itemcache.ErrAlreadyExists) {
		t.Errorf("a taken id: %v", err)
	}
	must(client.Update(ctx, &itemcachev1.Item{Id: "x", Title: "newer"}, nil))
	item.Title = "older"
	if _, err = client.Update(ctx, item, nil); !errors.Is(err, itemcache.ErrConflict) {
		t.Errorf("an old etag: %v", err)
	}
	if _, err = client.Get(ctx, "x", &itemcache.ReadOptions{MinRevision: 1 << 60}); !errors.Is(err, itemcache.ErrOutOfRange) {
		t.Errorf("a revision of the future: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err = client.Get(cancelled, "x", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context: %v", err)
	}
	hasty := connect(t, itemcache.Options{Timeout: time.Nanosecond})
	if _, err = hasty.Get(ctx, "x", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a default deadline: %v", err)
	}
	if _, err = client.Invalidate(ctx, itemcache.Invalidation{}); !errors.Is(err, itemcache.ErrInvalidArgument) {
		t.Errorf("an invalidation of nothing: %v", err)
	}
}

func TestAWriteThatIsRepeatedWithItsRequestIdHappensOnce(t *testing.T) {
	client, ctx := connect(t, itemcache.Options{}), t.Context()
	for range 2 {
		created := must(client.Create(ctx, &itemcachev1.Item{Id: "once"}, &itemcache.CreateOptions{RequestID: "r-1"}))
		if created.Item.GetId() != "once" {
			t.Errorf("created %v", created)
		}
	}
}

func TestTheGeneratedClientHasWhatTheClientHas(t *testing.T) {
	client, ctx := connect(t, itemcache.Options{}), t.Context()
	must(client.Create(ctx, &itemcachev1.Item{Id: "x", Category: "lamps"}, nil))
	page := must(client.Service().ListItems(ctx, &itemcachev1.ListItemsRequest{Category: "lamps"}))
	if len(page.GetItems()) != 1 {
		t.Errorf("the tenant's lamps: %v", page)
	}
	_, err := client.Service().InspectItem(ctx, &itemcachev1.InspectItemRequest{})
	if !errors.Is(err, itemcache.ErrInvalidArgument) {
		t.Errorf("an inspection of nothing: %v", err)
	}
}

func TestTlsAndATokenOpenTheWayToTheTokensTenant(t *testing.T) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(running.Secure.CA)) {
		t.Fatal("no certificate")
	}
	secure := func(token string) *itemcache.Client {
		client := must(itemcache.Connect(running.Secure.Target, &itemcache.Options{
			TLS:     &tls.Config{RootCAs: roots},
			Token:   itemcache.StaticToken(token),
			Timeout: patience,
		}))
		t.Cleanup(func() { client.Close() })
		return client
	}
	ctx := t.Context()
	revision := must(secure(running.Secure.Writer).Create(ctx, &itemcachev1.Item{Id: "mine"}, nil)).Revision
	reader := secure(running.Secure.Reader)
	must(reader.Get(ctx, "mine", &itemcache.ReadOptions{MinRevision: revision}))
	if _, err := reader.Delete(ctx, "mine", nil); !errors.Is(err, itemcache.ErrPermissionDenied) {
		t.Errorf("a reader writes: %v", err)
	}
	if _, err := secure("wrong").Get(ctx, "mine", nil); !errors.Is(err, itemcache.ErrUnauthenticated) {
		t.Errorf("a wrong token: %v", err)
	}
}

func TestOptionsThatCannotBeAreRefused(t *testing.T) {
	token := &itemcache.Options{Token: itemcache.StaticToken("secret")}
	for target, options := range map[string]*itemcache.Options{
		"":                      nil,
		"a:1,b":                 nil,
		"localhost:1,":          nil,
		"cache.example:50051":   token,
		"127.0.0.1:1,cache-1:2": token,
		"localhost:1":           {Tenant: "a\nb"},
		"localhost:2":           {Timeout: -1},
	} {
		if _, err := itemcache.Connect(target, options); !errors.Is(err, itemcache.ErrInvalidArgument) {
			t.Errorf("%q: %v", target, err)
		}
	}
	for _, target := range []string{"localhost:1", "127.0.0.1:1,[::1]:2", "unix:/run/x.sock", "ipv4:127.0.0.1:1", "dns:///localhost:1"} {
		client, err := itemcache.Connect(target, token)
		if err != nil {
			t.Errorf("%q: %v", target, err)
			continue
		}
		client.Close()
	}
}
