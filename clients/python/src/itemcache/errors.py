"""What a call can fail with: one class for each status code of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from itemcache.v1.item_cache_pb2 import BatchGetItemsResult, CacheStatus


@dataclass(frozen=True)
class Violation:
    """One broken rule: ``field`` is the path in the request, as ``item.tags[3]``."""

    field: str
    description: str


class ItemCacheError(Exception):
    """Any failed call. The classes below name the codes of the contract; other codes come as this class."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str | None = None,
        violations: Sequence[Violation] = (),
        id: str | None = None,
        retry_after: float | None = None,
        cache: CacheStatus | None = None,
    ) -> None:
        """Make one with what is known besides the code."""
        super().__init__(message)
        self.code = code
        self.message = message
        #: Stable and in UPPER_SNAKE_CASE. None when the service did not answer, so did not say.
        self.reason = reason
        #: Every broken rule of the request, with INVALID_ARGUMENT.
        self.violations = tuple(violations)
        #: The item that the error is about.
        self.id = id
        #: Seconds after which a retry makes sense, when the service says so.
        self.retry_after = retry_after
        #: Which tier gave the answer, with NOT_FOUND.
        self.cache = cache

    def __str__(self) -> str:
        """Code, reason and message."""
        return f"{self.code.name}{f' ({self.reason})' if self.reason else ''}: {self.message}"


class InvalidArgumentError(ItemCacheError):
    """A field breaks a rule: ``violations`` names all of them. Do not retry."""


class NotFoundError(ItemCacheError):
    """Every authoritative tier says that the item is absent."""


class AlreadyExistsError(ItemCacheError):
    """The id of a create is taken."""


class ConflictError(ItemCacheError):
    """ABORTED: somebody else was faster (the etag is not the current one). Read again, then write again."""


class OutOfRangeError(ItemCacheError):
    """A revision is ahead of everything that was ever written."""


class ResourceExhaustedError(ItemCacheError):
    """Too large or too much at once; see ``retry_after``."""


class UnavailableError(ItemCacheError):
    """The service cannot be reached (``reason`` is None), or a tier that it needs is down. Retried already."""


class DeadlineExceededError(ItemCacheError):
    """The call took longer than its timeout, or than the service allows. A write may have happened."""


class CancelledError(ItemCacheError):
    """The client was closed. A write may have happened. (A cancelled task ends with asyncio's own error.)"""


class UnauthenticatedError(ItemCacheError):
    """The credential is missing or wrong."""


class PermissionDeniedError(ItemCacheError):
    """The credential does not allow this call."""


class UnimplementedError(ItemCacheError):
    """The service that answered does not offer the call: another release, or not an ItemCache at all."""


class InternalError(ItemCacheError):
    """A bug. The message has the reference under which the service logged it."""


_CLASSES: dict[grpc.StatusCode, type[ItemCacheError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def make(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str | None = None,
    violations: Sequence[Violation] = (),
    id: str | None = None,
    retry_after: float | None = None,
    cache: CacheStatus | None = None,
) -> ItemCacheError:
    """Make an error of the class that belongs to the code."""
    return _CLASSES.get(code, ItemCacheError)(
        code,
        message,
        reason=reason,
        violations=violations,
        id=id,
        retry_after=retry_after,
        cache=cache,
    )


def invalid(message: str, reason: str = "INVALID_OPTION") -> ItemCacheError:
    """Say that an argument cannot be."""
    return make(grpc.StatusCode.INVALID_ARGUMENT, message, reason=reason)


@contextmanager
def encoding() -> Iterator[None]:
    """Make InvalidArgumentErrors of what no message can hold, as a number of more than 64 bits."""
    try:
        yield
    except ValueError as cause:
        raise invalid(str(cause), "NOT_ENCODABLE") from cause


def of_item(result: BatchGetItemsResult) -> ItemCacheError:
    """Say what one item of a batch failed with."""
    error = result.error
    return make(
        _BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN),
        error.message,
        reason=error.reason or None,
        id=result.id,
        retry_after=_seconds(error.retry_delay) if error.HasField("retry_delay") else None,
        cache=result.cache if result.HasField("cache") else None,
    )


Trailers = Optional[Sequence[tuple[str, "str | bytes"]]]


def of_call(code: grpc.StatusCode, message: str | None, trailers: Trailers) -> ItemCacheError:
    """Say what a call failed with. Details that cannot be read are left out: code and message say enough."""
    encoded = next((value for key, value in trailers or () if key == "grpc-status-details-bin"), b"")
    status = Status()
    try:
        status.ParseFromString(encoded)
    except (DecodeError, TypeError):
        return make(code, message or "")
    info, bad, resource, retry, cache = ErrorInfo(), BadRequest(), ResourceInfo(), RetryInfo(), CacheStatus()
    found = {
        type(known): True
        for known in (info, bad, resource, retry, cache)
        for detail in status.details
        if detail.Unpack(known)
    }
    return make(
        code,
        message or "",
        reason=info.reason or None,
        violations=[Violation(broken.field, broken.description) for broken in bad.field_violations],
        id=resource.resource_name or None,
        retry_after=_seconds(retry.retry_delay) if RetryInfo in found else None,
        cache=cache if CacheStatus in found else None,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
