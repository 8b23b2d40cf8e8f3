"""The client for asyncio: what :mod:`itemcache.client` has, to be awaited.

A cancelled task ends its call, and raises asyncio's own CancelledError.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Union, cast

import grpc
import grpc.aio

from itemcache import _channel, _follow, _messages, errors
from itemcache._channel import Tls
from itemcache._follow import Follower, WatchMessage
from itemcache._messages import Fields, Freshness, GetManyResult, GetResult, ReadOptions, WriteResult
from itemcache.client import no_token
from itemcache.errors import ItemCacheError
from itemcache.v1 import item_cache_pb2 as pb
from itemcache.v1.item_cache_pb2_grpc import ItemCacheServiceStub

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

Token = Union[str, Callable[[], Union[str, Awaitable[str]]]]
_Metadata = tuple[tuple[str, str], ...]


def connect(
    target: str | Sequence[str],
    *,
    tenant: str | None = None,
    client_id: str | None = None,
    timeout: float = 1.0,
    tls: bool | Tls = False,
    token: Token | None = None,
    channel_options: Sequence[tuple[str, Any]] = (),
) -> Client:
    """Return a client of the service at ``target``; to be called where an event loop runs, which it belongs to.

    The arguments are those of :func:`itemcache.connect`; a function that provides the token may be a coroutine function.
    """
    settings = _channel.settings(
        target,
        tenant=tenant,
        client_id=client_id,
        timeout=timeout,
        tls=tls,
        has_token=token is not None,
        channel_options=channel_options,
    )
    return Client(settings, client_id, token)


class Client:
    """Calls an ItemCache service. Every method raises ItemCacheError only, or asyncio's CancelledError."""

    def __init__(self, settings: _channel.Settings, client_id: str | None, token: Token | None) -> None:
        """Use :func:`connect` instead."""
        if settings.credentials is None:
            self._channel = grpc.aio.insecure_channel(settings.target, settings.options)
        else:
            self._channel = grpc.aio.secure_channel(settings.target, settings.credentials, settings.options)
        #: The generated client, for :meth:`call` and for what has no method here.
        self.stub = ItemCacheServiceStub(self._channel)
        self._settings = settings
        self._client_id = client_id
        self._token = token
        self._closed = asyncio.Event()

    async def get(
        self,
        id: str,
        *,
        freshness: Freshness = "default",
        min_revision: int = 0,
        max_staleness: float | None = None,
        allow_stale: bool = True,
        fields: Fields = None,
        if_none_match: str = "",
        timeout: float | None = None,  # of the call itself: the service is told
    ) -> GetResult:
        """Return one item, as :meth:`itemcache.Client.get` does."""
        options = ReadOptions(freshness, min_revision, max_staleness, allow_stale, fields)
        request = _messages.get_request(id, options, if_none_match)
        return _messages.get_result(await self.call(self.stub.GetItem, request, timeout=timeout))

    async def get_many(
        self,
        ids: Iterable[str],
        *,
        freshness: Freshness = "default",
        min_revision: int = 0,
        max_staleness: float | None = None,
        allow_stale: bool = True,
        fields: Fields = None,
        timeout: float | None = None,
    ) -> dict[str, GetManyResult]:
        """Return any number of items by their ids, as :meth:`itemcache.Client.get_many` does."""
        options = ReadOptions(freshness, min_revision, max_staleness, allow_stale, fields)
        requests = list(_messages.batch_requests(ids, options))
        results: dict[str, GetManyResult] = {}
        for batch in requests:
            # For their order; each is replaced.
            results.update(_messages.batch_results(batch, pb.BatchGetItemsResponse()))
        rest = iter(requests)

        async def work() -> None:
            for request in rest:
                answer = await self.call(self.stub.BatchGetItems, request, timeout=timeout)
                results.update(_messages.batch_results(request, answer))

        workers = [asyncio.ensure_future(work()) for _ in range(_messages.BATCHES_AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            # When one batch fails, the others are of no use any more.
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return results

    async def create(
        self,
        item: pb.Item,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> WriteResult:
        """Create an item, as :meth:`itemcache.Client.create` does."""
        request = _messages.create_request(item, request_id)
        answer = await self.call(self.stub.CreateItem, request, timeout=timeout)
        return WriteResult(answer.item, answer.revision)

    async def update(
        self,
        item: pb.Item,
        *,
        fields: Fields = None,
        allow_missing: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> WriteResult:
        """Change an item, as :meth:`itemcache.Client.update` does."""
        request = _messages.update_request(item, fields, allow_missing, request_id)
        answer = await self.call(self.stub.UpdateItem, request, timeout=timeout)
        return WriteResult(answer.item, answer.revision)

    async def delete(
        self,
        id: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete an item, as :meth:`itemcache.Client.delete` does."""
        request = _messages.delete_request(id, etag, allow_missing, request_id)
        return (await self.call(self.stub.DeleteItem, request, timeout=timeout)).revision

    async def invalidate(
        self,
        *,
        ids: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
        everything: bool = False,
        remove: bool = False,
        refresh_origin: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Make every cache distrust copies, as :meth:`itemcache.Client.invalidate` does."""
        request = _messages.invalidate_request(ids, tags, everything, remove, refresh_origin, request_id)
        return (await self.call(self.stub.InvalidateItems, request, timeout=timeout)).revision

    async def watch(
        self,
        *,
        resume_after: int | None = None,
        ids: Sequence[str] = (),
        tags: Sequence[str] = (),
        include_items: bool = False,
        heartbeat: float | None = None,
        max_batch_delay: float | None = None,
        exclude_own_writes: bool = False,
    ) -> AsyncIterator[WatchMessage]:
        """Iterate over the tenant's invalidations, as :meth:`itemcache.Client.watch` does.

        It is an asynchronous generator: whoever breaks off closes it at once with ``contextlib.aclosing`` (or ``aclose``).
        """
        follower = Follower(
            resume_after=resume_after,
            ids=ids,
            tags=tags,
            include_items=include_items,
            heartbeat=heartbeat,
            max_batch_delay=max_batch_delay,
            exclude_own_writes=exclude_own_writes,
            client_id=self._client_id,
        )
        while not self._closed.is_set():
            try:
                async for message in self._stream(follower):
                    yield message
                error = _follow.ended()
            except ItemCacheError as broken:
                error = broken
            if self._closed.is_set():
                break
            yields, seconds = follower.broken(error)
            for message in yields:
                yield message
            await self._sleep(seconds)
        raise _closed()

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Answer],
        request: _Request,
        *,
        timeout: float | None = None,
    ) -> _Answer:
        """Call a unary method of :attr:`stub`, as :meth:`itemcache.Client.call` does."""
        seconds = self._settings.timeout if timeout is None else _channel.checked_timeout(timeout)
        headers = await self._headers()
        if self._closed.is_set():
            raise _closed()
        try:
            return await method(request, timeout=seconds, metadata=headers)
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from None
        except asyncio.CancelledError:
            # So gRPC ends the calls of a channel that is closed, too.
            if self._closed.is_set():
                raise _closed() from None
            raise

    async def close(self) -> None:
        """End the calls under way, the watches and the connections."""
        self._closed.set()
        await self._channel.close()

    async def __aenter__(self) -> Client:
        """Return itself: ``async with connect(…) as client``."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def _stream(self, follower: Follower) -> AsyncIterator[WatchMessage]:
        """Follow one stream until it ends."""
        headers = await self._headers()
        if self._closed.is_set():
            raise _closed()
        request = follower.begin(time.monotonic())
        call = self.stub.WatchInvalidations(request, metadata=headers)
        try:
            while True:
                try:
                    message = await asyncio.wait_for(call.read(), follower.silence)
                except asyncio.TimeoutError:
                    raise _follow.silent() from None
                except grpc.aio.AioRpcError as error:
                    raise _typed(error) from None
                except asyncio.CancelledError:
                    if self._closed.is_set():
                        raise _closed() from None
                    raise
                if not isinstance(message, pb.WatchInvalidationsResponse):
                    return
                for one in follower.received(message):
                    yield one
        finally:
            call.cancel()

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the client is closed."""
        try:
            await asyncio.wait_for(self._closed.wait(), seconds)
        except asyncio.TimeoutError:
            return

    async def _headers(self) -> _Metadata:
        token = self._token
        if token is None:
            return self._settings.metadata
        if not isinstance(token, str):
            try:
                provided = token()
                token = await provided if inspect.isawaitable(provided) else provided
            except Exception as cause:
                raise no_token() from cause
        return (*self._settings.metadata, ("authorization", f"Bearer {token}"))


def _typed(error: grpc.aio.AioRpcError) -> ItemCacheError:
    # Iterating over it gives pairs, whatever the stubs say.
    trailers = cast("errors.Trailers", error.trailing_metadata())
    return errors.of_call(error.code(), error.details(), trailers)


def _closed() -> ItemCacheError:
    return errors.make(grpc.StatusCode.CANCELLED, "the client is closed")
