from __future__ import annotations

import threading
import unittest
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
from google.protobuf.duration_pb2 import Duration

import itemcache
from itemcache import Disconnected, Event, Gap, Heartbeat, Resumed, Started, aio
from itemcache.v1 import item_cache_pb2 as pb
from itemcache.v1.item_cache_pb2_grpc import ItemCacheServiceServicer, add_ItemCacheServiceServicer_to_server

_Request = pb.WatchInvalidationsRequest
_Response = pb.WatchInvalidationsResponse
_Script = Callable[[_Request, grpc.ServicerContext], Iterator[_Response]]


def started(position: int, heartbeat: float = 60) -> _Response:
    """Begin a stream. With a heartbeat of a minute it is not taken for dead, however slow the machine is."""
    interval = Duration()
    interval.FromNanoseconds(round(heartbeat * 1e9))
    return _Response(started=pb.InvalidationsStarted(position=position, heartbeat_interval=interval))


def batch(*revisions: int) -> _Response:
    rows = [pb.InvalidationEvent(revision=revision) for revision in revisions]
    return _Response(batch=pb.InvalidationsBatch(events=rows))


class Scripted(ItemCacheServiceServicer):
    """A server that says what a healthy service never says: one script for each stream, in order."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._scripts: Iterator[_Script] = iter((self.first, self.second, self.third, self.fourth, self.last))

    def WatchInvalidations(self, request: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        return next(self._scripts)(request, context)

    def first(self, _: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        yield started(10)
        yield batch(11, 12, 12, 15)
        yield _Response(heartbeat=pb.InvalidationsHeartbeat(revision=17))
        context.abort(grpc.StatusCode.INTERNAL, "reset")

    def second(self, request: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        if request.resume_after != 17:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"resumed after {request.resume_after}")
        yield started(17)
        yield _Response(gap=pb.InvalidationsGap(after=17, through=20))
        yield batch(20, 21)

    def third(self, _: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        """Begin, and be silent for ever: the watch must give it up."""
        yield started(21, heartbeat=0.1)
        context.add_callback(self.over.set)
        self.over.wait()

    def fourth(self, _: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        yield started(21)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def last(self, _: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "withdrawn")
        yield from ()


def summary(message: itemcache.WatchMessage) -> str:
    if isinstance(message, Event):
        assert message.row.kind == pb.INVALIDATION_KIND_TENANT_INVALIDATED
        return f"{message.revision}"
    if isinstance(message, Gap):
        return f"gap {message.after}-{message.through}"
    if isinstance(message, Heartbeat):
        return f"heartbeat {message.revision}"
    assert isinstance(message, (Disconnected, Resumed, Started))
    return type(message).__name__.lower()


EXPECTED = [
    *("started", "11", "12", "gap 12-14", "15", "gap 15-17", "heartbeat 17"),
    *("disconnected", "resumed", "gap 17-20", "21"),
    *("disconnected", "resumed"),
    *("disconnected", "resumed", "disconnected"),
]


class Resuming(ItemCacheServiceServicer):
    """A server that ends the first stream."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._streams = 0

    def WatchInvalidations(self, _: _Request, context: grpc.ServicerContext) -> Iterator[_Response]:
        self._streams += 1
        yield started(10)
        if self._streams == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        context.add_callback(self.over.set)
        self.over.wait()


class EveryOther:
    """A provider of tokens that fails, then does not, and so on."""

    def __init__(self) -> None:
        self._asked = 0

    def __call__(self) -> str:
        self._asked += 1
        if self._asked % 2 == 1:
            raise OSError("no network")
        return "t"


class FollowTest(unittest.IsolatedAsyncioTestCase):
    def serve(self, scripted: Scripted | Resuming | None = None) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(8))
        scripted = scripted or Scripted()  # type: ignore[abstract]  # the other calls are unimplemented
        add_ItemCacheServiceServicer_to_server(scripted, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.addCleanup(server.stop, None)
        self.addCleanup(scripted.over.set)
        return f"127.0.0.1:{port}"

    def test_a_watch_names_what_is_missing_and_leaves_out_what_comes_twice(self) -> None:
        seen: list[str] = []
        with itemcache.connect(self.serve(), timeout=20) as client:
            # So there is a connection when the watch begins.
            with self.assertRaises(itemcache.UnimplementedError):
                client.get("x")
            with self.assertRaises(itemcache.PermissionDeniedError):
                seen.extend(summary(message) for message in client.watch())
        self.assertEqual(seen, EXPECTED)

    async def test_so_does_a_watch_of_asyncio(self) -> None:
        seen: list[str] = []
        async with aio.connect(self.serve(), timeout=20) as client:
            with self.assertRaises(itemcache.UnimplementedError):
                await client.get("x")
            with self.assertRaises(itemcache.PermissionDeniedError):
                async for message in client.watch():
                    seen.append(summary(message))
        self.assertEqual(seen, EXPECTED)

    def test_a_token_that_cannot_be_had_ends_a_watch_that_begins_and_not_one_that_goes_on(self) -> None:
        target = self.serve(Resuming())  # type: ignore[abstract]
        seen: list[str] = []
        with itemcache.connect(target, timeout=20, token=EveryOther()) as client:
            with self.assertRaises(itemcache.UnauthenticatedError):
                next(client.watch())
            for message in client.watch():
                seen.append(summary(message))
                if isinstance(message, Resumed):
                    break
        self.assertEqual(seen, ["started", "disconnected", "resumed"])

    async def test_so_it_does_with_asyncio(self) -> None:
        target = self.serve(Resuming())  # type: ignore[abstract]
        seen: list[str] = []
        async with aio.connect(target, timeout=20, token=EveryOther()) as client:
            with self.assertRaises(itemcache.UnauthenticatedError):
                await client.watch().__anext__()
            async for message in client.watch():
                seen.append(summary(message))
                if isinstance(message, Resumed):
                    break
        self.assertEqual(seen, ["started", "disconnected", "resumed"])
