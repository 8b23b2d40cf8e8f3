"""The client for threads. ``connect`` is the way to get one; :mod:`itemcache.aio` has the one for asyncio."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, Union

import grpc

from itemcache import _channel, _follow, _messages, errors
from itemcache._channel import Tls
from itemcache._follow import Follower, WatchMessage
from itemcache._messages import Fields, Freshness, GetManyResult, GetResult, ReadOptions, WriteResult
from itemcache.errors import ItemCacheError
from itemcache.v1 import item_cache_pb2 as pb
from itemcache.v1.item_cache_pb2_grpc import ItemCacheServiceStub

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

Token = Union[str, Callable[[], str]]
_Metadata = tuple[tuple[str, str], ...]


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


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
    """Return a client of the service at ``target``.

    It connects at the first call, and again whenever it must. Raises InvalidArgumentError for arguments that cannot be.

    :param target: ``host:port`` or an address form of gRPC (``dns:///…``, ``ipv4:…``, ``unix:…``). The addresses of one
        name take turns, and so do several targets, which are numeric addresses.
    :param tenant: whose items: 1 to 128 printable ASCII characters. Default: the service's, or that of the token.
    :param client_id: names the writer to those who watch.
    :param timeout: seconds for a unary call that names none itself, retries included.
    :param tls: True: TLS with the certificates that gRPC trusts.
    :param token: the bearer token, or a function that is asked for it at each call. Without TLS only for addresses of this
        machine: elsewhere everybody could read it.
    :param channel_options: options of the gRPC channel; they win over all of the above.
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
    """Calls an ItemCache service; any number of threads may use one. Every method raises ItemCacheError only."""

    def __init__(self, settings: _channel.Settings, client_id: str | None, token: Token | None) -> None:
        """Use :func:`connect` instead."""
        if settings.credentials is None:
            self._channel = grpc.insecure_channel(settings.target, settings.options)
        else:
            self._channel = grpc.secure_channel(settings.target, settings.credentials, settings.options)
        #: The generated client, for :meth:`call` and for what has no method here.
        self.stub = ItemCacheServiceStub(self._channel)
        self._settings = settings
        self._client_id = client_id
        self._token = token
        self._closed = False
        self._watches: weakref.WeakSet[_Watching] = weakref.WeakSet()

    def get(
        self,
        id: str,
        *,
        freshness: Freshness = "default",
        min_revision: int = 0,
        max_staleness: float | None = None,
        allow_stale: bool = True,
        fields: Fields = None,
        if_none_match: str = "",
        timeout: float | None = None,
    ) -> GetResult:
        """Return one item. NotFoundError when it is absent.

        :param freshness: ``fresh`` asks the database; ``cache-only`` asks memory and Redis only.
        :param min_revision: the state at this revision or a later one: to read one's own write, give the one it returned.
        :param max_staleness: a copy that was checked against the database more seconds ago is reloaded.
        :param allow_stale: whether a copy past its freshness may be served while it is reloaded.
        :param fields: the fields to return, as ``["title", "price.units"]``. Default: all.
        :param if_none_match: the etag of the copy that the caller has: when it is current, no item is sent.
        """
        options = ReadOptions(freshness, min_revision, max_staleness, allow_stale, fields)
        request = _messages.get_request(id, options, if_none_match)
        return _messages.get_result(self.call(self.stub.GetItem, request, timeout=timeout))

    def get_many(
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
        """Return any number of items, by their ids and in their order.

        An item that is missing or slow fails alone, with an ``error`` in its result. They are asked for in batches of 500,
        each with its own timeout; raises when a batch fails as a whole. The arguments are those of :meth:`get`.
        """
        options = ReadOptions(freshness, min_revision, max_staleness, allow_stale, fields)
        results: dict[str, GetManyResult] = {}
        under_way: deque[tuple[pb.BatchGetItemsRequest, grpc.Future[pb.BatchGetItemsResponse]]] = deque()

        def land() -> None:
            request, call = under_way.popleft()
            results.update(_messages.batch_results(request, self._result(call)))

        try:
            for request in _messages.batch_requests(ids, options):
                if len(under_way) == _messages.BATCHES_AT_ONCE:
                    land()
                under_way.append((request, self._begin(self.stub.BatchGetItems, request, timeout)))
            while under_way:
                land()
        finally:
            # When one batch fails, the others are of no use any more.
            for _, call in under_way:
                call.cancel()
        return results

    def create(
        self, item: pb.Item, *, request_id: str | None = None, timeout: float | None = None
    ) -> WriteResult:
        """Create an item. AlreadyExistsError when the id is taken, also by an item of the origin.

        :param request_id: a call with the same one within 24 h returns the first outcome instead of writing again. Default:
            a random one, so that the client's own retries are safe. Give one to make a retry of yours safe, too.
        """
        request = _messages.create_request(item, request_id)
        answer = self.call(self.stub.CreateItem, request, timeout=timeout)
        return WriteResult(answer.item, answer.revision)

    def update(
        self,
        item: pb.Item,
        *,
        fields: Fields = None,
        allow_missing: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> WriteResult:
        """Change an item, or the part of it that ``fields`` names.

        When the item carries an etag, as one that was read does, and somebody has changed it since: ConflictError.

        :param fields: the fields to change; one that is not set in the item is cleared; ``*``: all. Default: those set.
        :param allow_missing: create the item when it is absent, instead of NotFoundError.
        """
        request = _messages.update_request(item, fields, allow_missing, request_id)
        answer = self.call(self.stub.UpdateItem, request, timeout=timeout)
        return WriteResult(answer.item, answer.revision)

    def delete(
        self,
        id: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete an item, and return the revision of that. It stays deleted, whatever the origin says.

        :param etag: ConflictError when it is not the item's current one.
        :param allow_missing: an absent item is a success, instead of NotFoundError.
        """
        request = _messages.delete_request(id, etag, allow_missing, request_id)
        return self.call(self.stub.DeleteItem, request, timeout=timeout).revision

    def invalidate(
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
        """Make every cache distrust the copies that it holds of the named items, and return the revision of that.

        :param ids: these items, 1 to 500. One of ``ids``, ``tags`` and ``everything`` is given.
        :param tags: every item with one of these tags or categories, 1 to 32.
        :param everything: every item of the tenant.
        :param remove: the old copies may not be served at all, not even as stale while they are reloaded.
        :param refresh_origin: also fetch the items from the origin again; only with ``ids``, at most 100.
        """
        request = _messages.invalidate_request(ids, tags, everything, remove, refresh_origin, request_id)
        return self.call(self.stub.InvalidateItems, request, timeout=timeout).revision

    def watch(
        self,
        *,
        resume_after: int | None = None,
        ids: Sequence[str] = (),
        tags: Sequence[str] = (),
        include_items: bool = False,
        heartbeat: float | None = None,
        max_batch_delay: float | None = None,
        exclude_own_writes: bool = False,
    ) -> Watch:
        """Iterate over the tenant's invalidations, in order, each once.

        It resumes by itself after whatever breaks the connection, on any instance: see Disconnected and Resumed. What the
        service no longer holds is a Gap. A consumer that is slow slows the stream down and loses nothing within the
        service's retention. It ends when it is closed, or raises: CancelledError when the client is closed, OutOfRangeError
        when ``resume_after`` is ahead of the log, or what no retry would help against.

        :param resume_after: continue exactly after this revision. Default: begin now.
        :param ids: only events that may concern one of these, at most 500. Default, with no ``tags``: all.
        :param tags: only events that may concern one of these tags or categories, at most 32.
        :param include_items: events of kind UPSERTED carry their items.
        :param heartbeat: seconds between heartbeats, 0.1 to 60. Default: 0.5.
        :param max_batch_delay: seconds that events may wait to be sent together, up to 1. Default: 0.
        :param exclude_own_writes: leave out what clients with this client's ``client_id`` write.
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
        watching = _Watching(self.stub, self._headers)
        self._watches.add(watching)
        if self._closed:
            watching.end(_closed())
        return Watch(watching, follower)

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Answer],
        request: _Request,
        *,
        timeout: float | None = None,
    ) -> _Answer:
        """Call a unary method of :attr:`stub` with this client's credentials, timeout, retries and errors.

        The retries make a ``request_id`` necessary in what writes.
        """
        return self._result(self._begin(method, request, timeout))

    def close(self) -> None:
        """End the calls under way, the watches and the connections."""
        self._closed = True
        for watching in list(self._watches):
            watching.end(_closed())
        self._channel.close()

    def __enter__(self) -> Client:
        """Return itself: ``with connect(…) as client``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def _begin(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Answer],
        request: _Request,
        timeout: float | None,
    ) -> grpc.Future[_Answer]:
        seconds = self._settings.timeout if timeout is None else _channel.checked_timeout(timeout)
        headers = self._headers()
        try:
            return method.future(request, timeout=seconds, metadata=headers)
        except ValueError:
            if self._closed:
                raise _closed() from None
            raise

    def _result(self, call: grpc.Future[_Answer]) -> _Answer:
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise _closed() from None
        except grpc.RpcError as error:
            raise _typed(error) from None

    def _headers(self) -> _Metadata:
        token = self._token
        if token is None:
            return self._settings.metadata
        if not isinstance(token, str):
            try:
                token = token()
            except Exception as cause:
                raise no_token() from cause
        return (*self._settings.metadata, ("authorization", f"Bearer {token}"))


class Watch:
    """The messages of a watch: an iterator that any thread may close. Closing it ends the iteration."""

    def __init__(self, watching: _Watching, follower: Follower) -> None:
        """Use :meth:`Client.watch` instead."""
        self._watching = watching
        self._messages = _follow_on(watching, follower)

    def __iter__(self) -> Watch:
        """Return itself."""
        return self

    def __next__(self) -> WatchMessage:
        """Wait for the next message."""
        return next(self._messages)

    def close(self) -> None:
        """End the watch."""
        self._watching.end(None)

    def __enter__(self) -> Watch:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the watch."""
        self.close()


class _Watching:
    """What ends a watch from outside of its iteration."""

    def __init__(self, stub: ItemCacheServiceStub, headers: Callable[[], _Metadata]) -> None:
        self.stub = stub
        self.headers = headers
        self.error: ItemCacheError | None = None
        self.over = False
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._call: _Cancellable | None = None

    def end(self, error: ItemCacheError | None) -> None:
        """End it: with this error or, without one, in silence."""
        with self._lock:
            if self.over:
                return
            self.over = True
            self.error = error
            call = self._call
        self._wake.set()
        if call is not None:
            call.cancel()

    def attach(self, call: _Cancellable | None) -> None:
        """Cancel this call, too, when the watch ends. None: none."""
        with self._lock:
            self._call = call
            over = self.over
        if over and call is not None:
            call.cancel()

    def sleep(self, seconds: float) -> None:
        """Wait, unless the watch ends."""
        self._wake.wait(seconds)


def _follow_on(watching: _Watching, follower: Follower) -> Iterator[WatchMessage]:
    """Yield what the watch yields. It knows no Watch, so that one which nobody holds any more ends at once."""
    while not watching.over:
        try:
            yield from _stream(watching, follower)
            error = _follow.ended()
        except ItemCacheError as broken:
            error = broken
        if watching.over:
            break
        yields, seconds = follower.broken(error)
        yield from yields
        watching.sleep(seconds)
    if watching.error is not None:
        raise watching.error


def _stream(watching: _Watching, follower: Follower) -> Iterator[WatchMessage]:
    """Follow one stream until it ends."""
    headers = watching.headers()
    request = follower.begin(time.monotonic())
    try:
        call = watching.stub.WatchInvalidations(request, metadata=headers)
    except ValueError:
        # The channel is closed.
        raise _closed() from None
    silence = _Silence(call)
    watching.attach(call)
    try:
        while True:
            silence.begin(follower.silence)
            message = next(call, None)
            silence.end()
            if message is None:
                return
            yield from follower.received(message)
    except grpc.RpcError as error:
        if silence.broken:
            raise _follow.silent() from None
        raise _typed(error) from None
    finally:
        watching.attach(None)
        silence.stop()
        call.cancel()


class _Silence:
    """Cancels a call from which nothing comes for too long, counted only while somebody waits for it."""

    def __init__(self, call: _Cancellable) -> None:
        self.broken = False
        self._call = call
        self._end: float | None = None
        self._stop = threading.Event()
        threading.Thread(target=self._look, name="itemcache-watch", daemon=True).start()

    def begin(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def end(self) -> None:
        self._end = None

    def stop(self) -> None:
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            end = self._end
            if end is not None and time.monotonic() > end:
                self.broken = True
                self._call.cancel()
                return


def _typed(error: grpc.RpcError) -> ItemCacheError:
    # What a call raises is both.
    assert isinstance(error, grpc.Call)
    return errors.of_call(error.code(), error.details(), error.trailing_metadata())


def _closed() -> ItemCacheError:
    return errors.make(grpc.StatusCode.CANCELLED, "the client is closed")


def no_token() -> ItemCacheError:
    """Say that the token provider failed."""
    return errors.make(grpc.StatusCode.UNAUTHENTICATED, "the token provider failed", reason="NO_TOKEN")
