package itemcache

import (
	"net"
	"net/netip"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// several is the scheme under which a list of addresses is given to gRPC. It is not one for users.
const several = "itemcache-several"

// resolvedTarget is a target as grpc.NewClient takes it.
type resolvedTarget struct {
	target    string
	addresses []string
	// Whether what is sent there stays on this machine.
	local bool
}

func parseTarget(target string) (resolvedTarget, error) {
	invalid := func(message string) (resolvedTarget, error) {
		return resolvedTarget{}, &Error{Code: codes.InvalidArgument, Reason: "INVALID_TARGET", Message: message}
	}
	if target == "" {
		return invalid("a target must not be empty")
	}
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return resolvedTarget{target: target, local: true}, nil
	}
	// gRPC for Go does not know this form, others do.
	list := strings.TrimPrefix(strings.TrimPrefix(target, "ipv4:"), "ipv6:")
	if !strings.Contains(list, ",") && list == target {
		host := strings.TrimPrefix(target, "dns:///")
		return resolvedTarget{target: target, local: isLoopback(host)}, nil
	}
	addresses := strings.Split(list, ",")
	local := true
	for _, address := range addresses {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return invalid("each of several targets is host:port, got " + address)
		}
		local = local && isLoopback(address)
	}
	return resolvedTarget{target: several + ":///" + addresses[0], addresses: addresses, local: local}, nil
}

// dialOptions tell gRPC the addresses of a list. Names among them are looked up whenever a connection is made.
func (t resolvedTarget) dialOptions() []grpc.DialOption {
	if t.addresses == nil {
		return nil
	}
	state := resolver.State{}
	for _, address := range t.addresses {
		host, _, _ := net.SplitHostPort(address)
		// The name that the certificate of this one must have.
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{
			Addresses: []resolver.Address{{Addr: address, ServerName: host}},
		})
	}
	builder := manual.NewBuilderWithScheme(several)
	builder.InitialState(state)
	return []grpc.DialOption{grpc.WithResolvers(builder)}
}

func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || (err == nil && ip.IsLoopback())
}
