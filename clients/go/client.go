package itemcache

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	_ "embed"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/itemcache/itemcache/clients/go/itemcachev1"
)

// Options say how a client calls. The zero value of each is its default.
type Options struct {
	// Tenant whose items are meant: 1 to 128 printable ASCII characters. Default: the service's default tenant, or that of
	// the token.
	Tenant string
	// ClientID names the writer to those who watch; as Tenant. Default: none.
	ClientID string
	// Timeout of unary calls whose context has no deadline, retries included. Default: one second.
	Timeout time.Duration
	// TLS is how TLS is spoken; &tls.Config{} trusts what the system trusts. Default: no TLS.
	TLS *tls.Config
	// Token provides the bearer token for each call, so it may renew it; see [StaticToken]. Without TLS only for addresses
	// of this machine: elsewhere everybody could read it. Default: none.
	Token func(context.Context) (string, error)
	// DialOptions are further options of the connection; they win over those above. Interceptors belong into
	// grpc.WithChainUnaryInterceptor.
	DialOptions []grpc.DialOption
}

// StaticToken is a token that does not change.
func StaticToken(token string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return token, nil }
}

// Client calls an ItemCache service. Any number of goroutines may use one at the same time.
type Client struct {
	conn     *grpc.ClientConn
	service  itemcachev1.ItemCacheServiceClient
	tenant   string
	clientID string
	timeout  time.Duration
	token    func(context.Context) (string, error)
}

const (
	defaultTimeout = time.Second
	// The largest answer is a batch of 500 items of 256 KiB.
	maxAnswerBytes = 160 << 20
	// How long a watch waits for a connection before its call is made nonetheless, which then says what is wrong.
	readyTimeout = 5 * time.Second
)

//go:embed service_config.json
var serviceConfig string

// ServiceConfig is the gRPC service config that ItemCache publishes: UNAVAILABLE is retried, at most three times within half
// a second. It is safe for writes that carry a request id, as all of this client do.
func ServiceConfig() string { return serviceConfig }

// Connect returns a client of the service at target: host:port, one of gRPC's address forms (dns:///…, unix:…, ipv4:…), or
// several host:port with commas between, which take turns, as do the addresses of one name. It connects at the first call,
// and again whenever it must. It fails with INVALID_ARGUMENT for options that cannot be. options may be nil.
func Connect(target string, options *Options) (*Client, error) {
	if options == nil {
		options = &Options{}
	}
	resolved, err := parseTarget(target)
	if err != nil {
		return nil, err
	}
	if options.Timeout < 0 {
		return nil, invalidOption("the timeout must not be negative")
	}
	for _, value := range []string{options.Tenant, options.ClientID} {
		if !isPrintable(value) {
			return nil, invalidOption("tenant and client id are printable ASCII characters")
		}
	}
	transport := insecure.NewCredentials()
	if options.TLS != nil {
		transport = credentials.NewTLS(options.TLS)
	} else if options.Token != nil && !resolved.local {
		return nil, invalidOption("a token is sent to other machines with TLS only")
	}
	client := &Client{
		tenant:   options.Tenant,
		clientID: options.ClientID,
		timeout:  options.Timeout,
		token:    options.Token,
	}
	if client.timeout == 0 {
		client.timeout = defaultTimeout
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		// One that a resolver finds might retry what must not be.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswerBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}),
		// gRPC would wait up to two minutes before it tries an instance again that was restarted.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  100 * time.Millisecond,
				Multiplier: 1.6,
				Jitter:     0.2,
				MaxDelay:   500 * time.Millisecond,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithUnaryInterceptor(client.unary),
		grpc.WithStreamInterceptor(client.stream),
	}
	dial = append(dial, resolved.dialOptions()...)
	client.conn, err = grpc.NewClient(resolved.target, append(dial, options.DialOptions...)...)
	if err != nil {
		return nil, invalidOption(err.Error())
	}
	client.service = itemcachev1.NewItemCacheServiceClient(client.conn)
	return client, nil
}

// Close ends the calls under way and the connections.
func (c *Client) Close() error { return c.conn.Close() }

// Service is the generated client on this client's connections: with its credentials, default deadline, retries, request ids
// and errors.
func (c *Client) Service() itemcachev1.ItemCacheServiceClient { return c.service }

// unary gives each call its deadline and its metadata, writes a request id, and makes an *Error of what fails.
func (c *Client) unary(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	ctx, err := c.withMetadata(ctx)
	if err != nil {
		return err
	}
	return errorOf(invoke(ctx, method, withRequestID(request), reply, conn, options...))
}

func (c *Client) stream(ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx, err := c.withMetadata(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := open(ctx, description, conn, method, options...)
	if err != nil {
		return nil, errorOf(err)
	}
	return typedStream{stream}, nil
}

// typedStream makes an *Error of what ends a stream, but for io.EOF.
type typedStream struct{ grpc.ClientStream }

func (s typedStream) RecvMsg(message any) error { return errorOf(s.ClientStream.RecvMsg(message)) }

func (c *Client) withMetadata(ctx context.Context) (context.Context, error) {
	var pairs []string
	if c.tenant != "" {
		pairs = append(pairs, "x-tenant-id", c.tenant)
	}
	if c.clientID != "" {
		pairs = append(pairs, "x-client-id", c.clientID)
	}
	if c.token != nil {
		token, err := c.token(ctx)
		if err != nil {
			return nil, &Error{Code: codes.Unauthenticated, Reason: "NO_TOKEN", Message: "the token provider failed", cause: err}
		}
		pairs = append(pairs, "authorization", "Bearer "+token)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...), nil
}

// withRequestID returns a request whose request_id is set, if it has such a field: that makes retries of writes safe.
func withRequestID(request any) any {
	if write, ok := request.(interface{ GetRequestId() string }); !ok || write.GetRequestId() != "" {
		return request
	}
	message, ok := request.(proto.Message)
	if !ok {
		return request
	}
	copied := proto.Clone(message).ProtoReflect()
	field := copied.Descriptor().Fields().ByName("request_id")
	copied.Set(field, protoreflect.ValueOfString(rand.Text()))
	return copied.Interface()
}

// ready waits until there is a connection, or for so long that the call had better be made to say why there is none.
func (c *Client) ready(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for state := c.conn.GetState(); state != connectivity.Ready; state = c.conn.GetState() {
		if state == connectivity.Shutdown {
			return
		}
		c.conn.Connect()
		if !c.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

var errClosed = &Error{Code: codes.Canceled, Message: "the client is closed"}

func (c *Client) isClosed() bool { return c.conn.GetState() == connectivity.Shutdown }

func isPrintable(text string) bool {
	for _, char := range []byte(text) {
		if char < 0x20 || char > 0x7e {
			return false
		}
	}
	return true
}

func invalidOption(message string) error {
	return &Error{Code: codes.InvalidArgument, Reason: "INVALID_OPTION", Message: message, cause: errors.New(message)}
}
