"""Requests out of arguments, and results out of answers: what both clients share."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from itemcache import errors
from itemcache.errors import ItemCacheError
from itemcache.v1 import item_cache_pb2 as pb

#: The most ids that one BatchGetItems may name.
BATCH_IDS = 500
#: Batches of one ``get_many`` that are under way at once: enough to keep a connection busy.
BATCHES_AT_ONCE = 4

Freshness = Literal["default", "cache-only", "fresh"]
Fields = Optional[Sequence[str]]

_FRESHNESS: dict[str, pb.Freshness.ValueType] = {
    "default": pb.FRESHNESS_DEFAULT,
    "cache-only": pb.FRESHNESS_CACHE_ONLY,
    "fresh": pb.FRESHNESS_FRESH,
}


@dataclass(frozen=True)
class GetResult:
    """The answer to one look-up."""

    #: None only when ``not_modified``, and for a miss with ``cache-only``. An absent item is a NotFoundError.
    item: pb.Item | None
    not_modified: bool
    #: Where the answer came from.
    cache: pb.CacheStatus
    #: The answer is the tenant's state at this revision.
    revision: int


@dataclass(frozen=True)
class GetManyResult:
    """The answer for one id: an item, or the error that ``get`` would have raised. Neither: a miss with ``cache-only``."""

    id: str
    item: pb.Item | None
    error: ItemCacheError | None
    #: Where the answer came from; None with an error that no tier gave.
    cache: pb.CacheStatus | None


@dataclass(frozen=True)
class WriteResult:
    """An item as it was stored."""

    item: pb.Item
    revision: int


@dataclass(frozen=True)
class ReadOptions:
    """How fresh an answer must be, and what of it is wanted: the arguments that ``get`` and ``get_many`` share."""

    freshness: Freshness
    min_revision: int
    max_staleness: float | None
    allow_stale: bool
    fields: Fields

    def message(self) -> pb.ReadOptions:
        """Return them as the contract has them."""
        if self.freshness not in _FRESHNESS:
            raise errors.invalid(f"freshness is one of {', '.join(_FRESHNESS)}, got {self.freshness}")
        return pb.ReadOptions(
            freshness=_FRESHNESS[self.freshness],
            min_revision=self.min_revision,
            max_staleness=duration(self.max_staleness),
            # Unset is True, and shorter.
            allow_stale=None if self.allow_stale else False,
        )


@errors.encoding()
def get_request(id: str, options: ReadOptions, if_none_match: str) -> pb.GetItemRequest:
    """Ask for one item."""
    return pb.GetItemRequest(
        id=id, options=options.message(), read_mask=field_mask(options.fields), if_none_match=if_none_match
    )


def get_result(answer: pb.GetItemResponse) -> GetResult:
    """Return what one look-up brought."""
    item = answer.item if answer.HasField("item") else None
    return GetResult(item, answer.not_modified, answer.cache, answer.revision)


def batch_requests(ids: Iterable[str], options: ReadOptions) -> Iterator[pb.BatchGetItemsRequest]:
    """Ask for many items, in as many batches as it takes."""
    with errors.encoding():
        message, mask = options.message(), field_mask(options.fields)
    distinct = list(dict.fromkeys(ids))
    for begin in range(0, len(distinct), BATCH_IDS):
        with errors.encoding():
            request = pb.BatchGetItemsRequest(
                ids=distinct[begin : begin + BATCH_IDS], options=message, read_mask=mask
            )
        yield request


def batch_results(
    request: pb.BatchGetItemsRequest, answer: pb.BatchGetItemsResponse
) -> dict[str, GetManyResult]:
    """Return what a batch brought, by id and in the order of the request."""
    results = {id: _unanswered(id) for id in request.ids}
    for result in answer.results:
        failed = result.HasField("error")
        results[result.id] = GetManyResult(
            id=result.id,
            item=result.item if result.HasField("item") else None,
            error=errors.of_item(result) if failed else None,
            cache=result.cache if result.HasField("cache") else None,
        )
    return results


def _unanswered(id: str) -> GetManyResult:
    message = "the service did not answer for this id"
    return GetManyResult(id, None, errors.make(grpc.StatusCode.INTERNAL, message, id=id), None)


@errors.encoding()
def create_request(item: pb.Item, request_id: str | None) -> pb.CreateItemRequest:
    """Ask for an item to be created."""
    return pb.CreateItemRequest(item=item, request_id=_request_id(request_id))


@errors.encoding()
def update_request(
    item: pb.Item, fields: Fields, allow_missing: bool, request_id: str | None
) -> pb.UpdateItemRequest:
    """Ask for an item to be changed."""
    return pb.UpdateItemRequest(
        item=item,
        update_mask=field_mask(fields),
        allow_missing=allow_missing,
        request_id=_request_id(request_id),
    )


@errors.encoding()
def delete_request(id: str, etag: str, allow_missing: bool, request_id: str | None) -> pb.DeleteItemRequest:
    """Ask for an item to be deleted."""
    return pb.DeleteItemRequest(
        id=id, etag=etag, allow_missing=allow_missing, request_id=_request_id(request_id)
    )


@errors.encoding()
def invalidate_request(
    ids: Sequence[str] | None,
    tags: Sequence[str] | None,
    everything: bool,
    remove: bool,
    refresh_origin: bool,
    request_id: str | None,
) -> pb.InvalidateItemsRequest:
    """Ask for copies to be distrusted."""
    if [ids is not None, tags is not None, everything].count(True) != 1:
        raise errors.invalid("one of ids, tags and everything says what is invalidated")
    return pb.InvalidateItemsRequest(
        ids=None if ids is None else pb.ItemIds(ids=ids),
        tags=None if tags is None else pb.ItemTags(tags=tags),
        all=True if everything else None,  # type: ignore[arg-type]  # None: this member of the oneof is not set
        mode=pb.INVALIDATION_MODE_REMOVE if remove else pb.INVALIDATION_MODE_EXPIRE,
        refresh_origin=refresh_origin,
        request_id=_request_id(request_id),
    )


def _request_id(given: str | None) -> str:
    return str(uuid.uuid4()) if given is None else given


def duration(seconds: float | None) -> Duration | None:
    """Return the message for a number of seconds."""
    if seconds is None:
        return None
    message = Duration()
    try:
        message.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError):
        raise errors.invalid(f"a duration is a number of seconds, got {seconds}") from None
    return message


def field_mask(fields: Fields) -> FieldMask | None:
    """Return the message for names of fields."""
    return None if fields is None else FieldMask(paths=fields)
