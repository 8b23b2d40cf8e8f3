"""The Python client of ItemCache, a cache of catalogue items behind one gRPC service.

Typed calls with sane defaults, errors that one can switch on, and a watch of invalidations that goes on over any disconnect.
:func:`connect` gives a client for threads, :func:`itemcache.aio.connect` one for asyncio.
"""

from itemcache._channel import SERVICE_CONFIG, Tls
from itemcache._follow import (
    Disconnected,
    Event,
    Gap,
    Heartbeat,
    Resumed,
    Started,
    WatchMessage,
)
from itemcache._messages import GetManyResult, GetResult, WriteResult
from itemcache.client import Client, Watch, connect
from itemcache.errors import (
    AlreadyExistsError,
    CancelledError,
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ItemCacheError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from itemcache.v1.item_cache_pb2 import (
    CacheOutcome,
    CacheStatus,
    InvalidationEvent,
    InvalidationKind,
    InvalidationMode,
    Item,
    Money,
    Rating,
    StaleReason,
    Tier,
)

__all__ = [
    "SERVICE_CONFIG",
    "AlreadyExistsError",
    "CacheOutcome",
    "CacheStatus",
    "CancelledError",
    "Client",
    "ConflictError",
    "DeadlineExceededError",
    "Disconnected",
    "Event",
    "Gap",
    "GetManyResult",
    "GetResult",
    "Heartbeat",
    "InternalError",
    "InvalidArgumentError",
    "InvalidationEvent",
    "InvalidationKind",
    "InvalidationMode",
    "Item",
    "ItemCacheError",
    "Money",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Rating",
    "ResourceExhaustedError",
    "Resumed",
    "StaleReason",
    "Started",
    "Tier",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Violation",
    "Watch",
    "WatchMessage",
    "WriteResult",
    "connect",
]
