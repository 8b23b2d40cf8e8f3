"""A watch that goes on: the stream of invalidations, resumed by its last bookmark on any instance whenever it breaks off.

What comes twice is left out, and what is missing without the service's word is named as a gap: so revisions come in order,
each once, and none is passed over in silence. This file decides; the clients move the messages.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import grpc

from itemcache import errors
from itemcache._messages import duration
from itemcache.errors import ItemCacheError
from itemcache.v1 import item_cache_pb2 as pb

_FIRST_BACKOFF = 0.05
_MAX_BACKOFF = 2.0
#: A stream from which nothing has come for so many heartbeats, and so long, is taken for dead.
_SILENT_HEARTBEATS = 5
_MIN_SILENCE = 2.0
_FIRST_SILENCE = 10.0


@dataclass(frozen=True)
class Started:
    """Comes first: events after ``position`` follow."""

    position: int
    oldest_resumable: int


@dataclass(frozen=True)
class Event:
    """One row of the tenant's log.

    A kind that this release does not know might concern anything, so it comes as TENANT_INVALIDATED.
    """

    row: pb.InvalidationEvent

    @property
    def revision(self) -> int:
        """The revision of the row."""
        return self.row.revision


@dataclass(frozen=True)
class Heartbeat:
    """Everything up to ``revision`` has been yielded: it can be given as ``resume_after``."""

    revision: int
    #: What was committed before this time of ``time.monotonic()`` has been yielded, or named by a Gap. None: unknown.
    heard_at: float | None


@dataclass(frozen=True)
class Gap:
    """The revisions after ``after`` up to ``through`` are lost: distrust every copy older than ``through``."""

    after: int
    through: int


@dataclass(frozen=True)
class Disconnected:
    """The stream is lost, or cannot be had yet.

    The watch goes on trying. Resumed, or Started if it has not come yet, follows when it has succeeded.
    """

    error: ItemCacheError


@dataclass(frozen=True)
class Resumed:
    """The watch goes on after this revision."""

    after: int


WatchMessage = Union[Started, Event, Heartbeat, Gap, Disconnected, Resumed]


def silent() -> ItemCacheError:
    """Say that a stream is taken for dead."""
    return errors.make(grpc.StatusCode.UNAVAILABLE, "nothing has come for too long")


def ended() -> ItemCacheError:
    """Say that a stream ended without an error."""
    return errors.make(grpc.StatusCode.UNAVAILABLE, "the stream has ended")


class Follower:
    """What a watch knows from stream to stream.

    For each stream: ``begin`` gives the request, ``received`` turns its messages into what is yielded, and ``broken`` tells
    what to yield and how many seconds to wait when it has ended, or raises why the watch cannot go on.
    """

    @errors.encoding()
    def __init__(
        self,
        *,
        resume_after: int | None,
        ids: Sequence[str],
        tags: Sequence[str],
        include_items: bool,
        heartbeat: float | None,
        max_batch_delay: float | None,
        exclude_own_writes: bool,
        client_id: str | None,
    ) -> None:
        """Begin with nothing but what is asked for."""
        self._request = pb.WatchInvalidationsRequest(
            resume_after=resume_after,
            ids=ids,
            tags=tags,
            heartbeat_interval=duration(heartbeat),
            max_batch_delay=duration(max_batch_delay),
            include_items=include_items,
            client_id=client_id or "",
            exclude_own_writes=exclude_own_writes,
        )
        self._cursor = resume_after
        self._dense = not ids and not tags and not exclude_own_writes
        self._started = False
        self._established = False
        self._failures = 0
        self._began = 0.0
        #: For how many seconds nothing may come, while somebody waits.
        self.silence = _FIRST_SILENCE

    def begin(self, now: float) -> pb.WatchInvalidationsRequest:
        """Begin the next stream, at this time of the monotonic clock."""
        self._began = now
        self.silence = _FIRST_SILENCE
        request = pb.WatchInvalidationsRequest()
        request.CopyFrom(self._request)
        if self._cursor is not None:
            request.resume_after = self._cursor
        return request

    def received(self, message: pb.WatchInvalidationsResponse) -> Iterator[WatchMessage]:
        """Yield what a message of the stream says."""
        event = message.WhichOneof("event")
        if event == "started":
            yield self._start(message.started)
        elif event == "batch":
            for row in message.batch.events:
                if self._cursor is not None and row.revision <= self._cursor:
                    continue
                yield from self._advance(row.revision, row.revision - 1)
                yield Event(_known(row))
        elif event == "heartbeat":
            revision = message.heartbeat.revision
            if self._cursor is None or revision > self._cursor:
                yield from self._advance(revision, revision)
            heard_after = message.heartbeat.heard_after
            heard_at = self._began + heard_after.ToNanoseconds() / 1e9
            has = message.heartbeat.HasField("heard_after")
            yield Heartbeat(revision if self._cursor is None else self._cursor, heard_at if has else None)
        elif event == "gap":
            after, through = message.gap.after, message.gap.through
            if self._cursor is None or through > self._cursor:
                self._cursor = through
                yield Gap(after, through)
        # After `draining` UNAVAILABLE follows; another instance can have the watch at once.

    def broken(self, error: ItemCacheError) -> tuple[list[WatchMessage], float]:
        """Say what to yield, and how long to wait before the next stream. Raises when no retry would help."""
        if not self._established and not _is_worth_a_retry(error, self._started):
            raise error
        yields: list[WatchMessage] = [Disconnected(error)] if self._established or self._failures == 0 else []
        backoff = min(_MAX_BACKOFF, _FIRST_BACKOFF * 2 ** min(self._failures, 10))
        self._failures += 1
        self._established = False
        return yields, random.random() * backoff

    def _start(self, started: pb.InvalidationsStarted) -> WatchMessage:
        self._established = True
        self._failures = 0
        self.silence = max(
            _MIN_SILENCE, _SILENT_HEARTBEATS * started.heartbeat_interval.ToNanoseconds() / 1e9
        )
        if self._cursor is None:
            self._cursor = started.position
        if self._started:
            return Resumed(started.position)
        self._started = True
        return Started(started.position, started.oldest_resumable)

    def _advance(self, revision: int, through: int) -> Iterator[Gap]:
        """Move the cursor. Where every revision should have come, those up to ``through`` that have not are a gap."""
        after = self._cursor
        self._cursor = revision
        if self._dense and after is not None and through > after:
            yield Gap(after, through)


def _known(row: pb.InvalidationEvent) -> pb.InvalidationEvent:
    if row.kind == 0 or row.kind not in pb.InvalidationKind.values():
        row.kind = pb.INVALIDATION_KIND_TENANT_INVALIDATED
    if row.mode != pb.INVALIDATION_MODE_EXPIRE:
        row.mode = pb.INVALIDATION_MODE_REMOVE
    return row


def _is_worth_a_retry(error: ItemCacheError, started: bool) -> bool:
    """Say whether another attempt may do better.

    Once a watch has begun, too many watchers on an instance is as much a reason to try another as its end, and a token that
    cannot be had now may be had later.
    """
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return True
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED or error.reason == "NO_TOKEN":
        return started
    # What the service itself says has a reason; without one a connection broke.
    broke = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
    return error.reason is None and error.code in broke
