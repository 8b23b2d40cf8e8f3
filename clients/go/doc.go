// Package itemcache is the Go client of ItemCache, a cache of catalogue items behind one gRPC service: typed calls with sane
// defaults, errors that one can switch on, and a watch of invalidations that goes on over any disconnect.
//
//	client, err := itemcache.Connect("cache-1:50051,cache-2:50051", &itemcache.Options{Tenant: "shop"})
//	if err != nil {
//		return err
//	}
//	defer client.Close()
//	answer, err := client.Get(ctx, "1", nil)
//
// A call whose context has no deadline takes at most [Options.Timeout], one second unless set. UNAVAILABLE is retried up to
// three times within half a second, as the service config says that ItemCache publishes; that is safe for writes too, since
// each carries a request id. What fails is an [*Error].
//
// Messages are the generated ones of package itemcachev1; [Client.Service] is the generated client itself, with everything
// above, for the calls that have no method here.
package itemcache
