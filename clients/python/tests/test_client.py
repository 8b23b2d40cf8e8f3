from __future__ import annotations

import socket
import threading
import time
import unittest
from collections.abc import Callable, Iterator

import grpc

import itemcache
from itemcache import Item, Tls
from itemcache.v1.item_cache_pb2 import (
    INVALIDATION_KIND_TAGS_INVALIDATED,
    INVALIDATION_MODE_REMOVE,
    TIER_POSTGRES,
    InspectItemRequest,
    ListItemsRequest,
)
from tests.servers import servers

#: A busy machine may be slow; none of these tests is about time.
PATIENCE = 20.0


def setUpModule() -> None:
    servers()


class Following:
    """Reads a watch, and checks that revisions come in order, each once, none left out."""

    def __init__(self, test: unittest.TestCase, watch: Iterator[itemcache.WatchMessage]) -> None:
        self.test = test
        self.watch = watch
        self.last = 0
        self.resumed = 0

    def take(self, message: itemcache.WatchMessage) -> None:
        if isinstance(message, itemcache.Started):
            self.last = message.position
        elif isinstance(message, itemcache.Resumed):
            self.resumed += 1
        elif isinstance(message, itemcache.Gap):
            self.test.fail(f"a gap where nothing is missing: {message}")
        elif isinstance(message, itemcache.Heartbeat):
            self.test.assertEqual(message.revision, self.last)
            self.test.assertIsNotNone(message.heard_at)
        elif isinstance(message, itemcache.Event):
            self.test.assertEqual(message.revision, self.last + 1)
            self.last = message.revision

    def start(self) -> None:
        """Read the beginning."""
        while self.last == 0:
            self.take(next(self.watch))

    def until(self, revision: int) -> None:
        """Read up to the event with this revision."""
        while self.last < revision:
            self.take(next(self.watch))


def nobody_answered(error: itemcache.ItemCacheError) -> bool:
    """Tell whether an error is about the way to the service, and not of the service."""
    return isinstance(error, itemcache.UnavailableError) or error.reason is None


class ClientTest(unittest.TestCase):
    def connect(self, client_id: str | None = None, timeout: float = PATIENCE) -> itemcache.Client:
        client = itemcache.connect(servers().targets, tenant=self.id(), client_id=client_id, timeout=timeout)
        self.addCleanup(client.close)
        return client

    def write(self, client: itemcache.Client, title: str) -> int:
        """Change an item until that has succeeded, and return the revision of it."""
        end = time.monotonic() + 60
        while True:
            try:
                item = Item(id="x", title=title)
                return client.update(item, allow_missing=True, request_id=f"write-{title}").revision
            except itemcache.ItemCacheError as error:
                if not nobody_answered(error) or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def test_a_client_reads_what_it_writes_on_every_server_and_sees_where_it_came_from(self) -> None:
        client = self.connect()
        created = client.create(Item(id="lamp", title="Lamp", tags=["new"]))
        updated = client.update(Item(id="lamp", title="Brass lamp"))
        self.assertGreater(updated.revision, created.revision)
        self.assertEqual(list(updated.item.tags), ["new"])
        for _ in range(4):
            read = client.get("lamp", min_revision=updated.revision)
            assert read.item is not None
            self.assertEqual(read.item.title, "Brass lamp")
            self.assertGreaterEqual(read.cache.as_of, updated.revision)
            self.assertNotEqual(read.cache.tier, 0)
        same = client.get("lamp", min_revision=updated.revision, if_none_match=updated.item.etag)
        self.assertTrue(same.not_modified)
        self.assertIsNone(same.item)
        fresh = client.get("lamp", freshness="fresh", fields=["title"])
        self.assertEqual(fresh.cache.tier, TIER_POSTGRES)
        self.assertEqual(fresh.item, Item(title="Brass lamp"))
        self.assertGreater(client.delete("lamp", etag=updated.item.etag), updated.revision)

    def test_a_call_that_nobody_answers_ends_after_its_timeout(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            target = f"127.0.0.1:{silent.getsockname()[1]}"
            with (
                itemcache.connect(target, timeout=0.1) as client,
                self.assertRaises(itemcache.DeadlineExceededError),
            ):
                client.get("x")
            with (
                itemcache.connect(target, timeout=PATIENCE) as client,
                self.assertRaises(itemcache.DeadlineExceededError),
            ):
                client.get("x", timeout=0.1)

    def test_a_timeout_may_be_as_long_as_one_likes(self) -> None:
        client = self.connect(timeout=float("inf"))
        client.create(Item(id="x"))
        client.get("x", timeout=1e12)

    def test_get_many_answers_any_number_of_ids_in_their_order(self) -> None:
        client = self.connect()
        revision = client.create(Item(id="one", title="One")).revision
        ids = ["one", "one", *(f"absent-{i}" for i in range(2200))]
        results = client.get_many(ids, min_revision=revision)
        self.assertEqual(list(results), ids[1:])
        one, absent = results["one"], results["absent-2199"]
        assert one.item is not None
        assert one.cache is not None
        self.assertEqual((one.item.title, one.error), ("One", None))
        self.assertIsInstance(absent.error, itemcache.NotFoundError)
        with self.assertRaises(itemcache.InvalidArgumentError):
            client.get_many([*ids, ""])

    def test_errors_say_what_the_service_says(self) -> None:
        client = self.connect()
        with self.assertRaises(itemcache.NotFoundError) as absent:
            client.get("absent")
        self.assertEqual(absent.exception.code, grpc.StatusCode.NOT_FOUND)
        self.assertEqual((absent.exception.id, absent.exception.reason), ("absent", "ITEM_NOT_FOUND"))
        self.assertIsNotNone(absent.exception.cache)
        with self.assertRaises(itemcache.InvalidArgumentError) as broken:
            client.create(Item(id="x", tags=["", "t" * 65]))
        self.assertEqual([one.field for one in broken.exception.violations], ["item.tags[0]", "item.tags[1]"])
        item = client.create(Item(id="x")).item
        with self.assertRaises(itemcache.AlreadyExistsError):
            client.create(Item(id="x"))
        client.update(Item(id="x", title="newer"))
        item.title = "older"
        with self.assertRaises(itemcache.ConflictError):
            client.update(item)
        with self.assertRaises(itemcache.OutOfRangeError):
            client.get("x", min_revision=1 << 60)
        with self.assertRaises(itemcache.InvalidArgumentError):
            client.invalidate()

    def test_a_write_that_is_repeated_with_its_request_id_happens_once(self) -> None:
        client = self.connect()
        first = client.create(Item(id="once"), request_id="r-1")
        self.assertEqual(client.create(Item(id="once"), request_id="r-1").revision, first.revision)

    def test_the_generated_client_can_be_called_as_the_client_calls(self) -> None:
        client = self.connect()
        client.create(Item(id="x", category="lamps"))
        page = client.call(client.stub.ListItems, ListItemsRequest(category="lamps"))
        self.assertEqual([item.id for item in page.items], ["x"])
        with self.assertRaises(itemcache.InvalidArgumentError):
            client.call(client.stub.InspectItem, InspectItemRequest())

    def test_tls_and_a_token_open_the_way_to_the_tokens_tenant(self) -> None:
        secure = servers().secure

        def connect(token: str) -> itemcache.Client:
            client = itemcache.connect(
                secure["target"], tls=Tls(ca=secure["ca"].encode()), token=lambda: token, timeout=PATIENCE
            )
            self.addCleanup(client.close)
            return client

        revision = connect(secure["writer"]).create(Item(id="mine-sync")).revision
        reader = connect(secure["reader"])
        reader.get("mine-sync", min_revision=revision)
        with self.assertRaises(itemcache.PermissionDeniedError):
            reader.delete("mine-sync")
        with self.assertRaises(itemcache.UnauthenticatedError):
            connect("wrong").get("mine-sync")

    def test_arguments_that_cannot_be_are_refused(self) -> None:
        for targets in ("", [], ["127.0.0.1:1", ""], ["cache-1:1", "cache-2:1"], ["127.0.0.1:1", "[::1]:1"]):
            with self.assertRaises(itemcache.InvalidArgumentError, msg=targets):
                itemcache.connect(targets)
        for target in ("cache.example:50051", "dns:///cache.example:1", "10.0.0.1:1"):
            with self.assertRaises(itemcache.InvalidArgumentError, msg=target):
                itemcache.connect(target, token="secret")
        with self.assertRaises(itemcache.InvalidArgumentError):
            itemcache.connect("localhost:1", tenant="a\nb")
        with self.assertRaises(itemcache.InvalidArgumentError):
            itemcache.connect("localhost:1", timeout=0)
        with itemcache.connect("127.0.0.1:1") as client:
            attempts: list[Callable[[], object]] = [
                lambda: client.get("\ud800"),
                lambda: client.get("x", min_revision=1 << 70),
                lambda: client.get_many(["x"], min_revision=1 << 70),
                lambda: client.get_many(["\ud800"]),
                lambda: client.delete("\ud800"),
                lambda: client.watch(resume_after=1 << 70),
            ]
            for attempt in attempts:
                with self.assertRaises(itemcache.InvalidArgumentError):
                    attempt()
        for target in ("localhost:1", "dns:///localhost:1", "[::1]:1", "ipv4:127.0.0.1:1", "unix:/run/x"):
            itemcache.connect(target, token="secret").close()

    def test_a_watch_survives_the_death_of_its_servers_in_order_and_each_revision_once(self) -> None:
        client = self.connect()
        watch = client.watch(heartbeat=0.1)
        self.addCleanup(watch.close)
        following = Following(self, watch)
        following.start()
        following.until(self.write(client, "both live"))
        servers().do("kill 0")
        following.until(self.write(client, "only the second lives"))
        servers().do("start 0")
        servers().do("kill 1")
        following.until(self.write(client, "only the first lives"))
        self.assertGreater(following.resumed, 0)
        servers().do("kill 0")
        servers().do("start 0")
        servers().do("start 1")
        # Whatever is written while the watch is away comes when it is back.
        for i in range(20):
            self.write(client, f"number {i}")
        following.until(self.write(client, "the last"))

    def test_a_watch_resumes_after_any_bookmark_also_in_another_client(self) -> None:
        client = self.connect()
        revisions = [self.write(client, f"{i}") for i in range(6)]
        with self.connect().watch(resume_after=revisions[0]) as watch:
            following = Following(self, watch)
            following.start()
            self.assertEqual(following.last, revisions[0])
            following.until(revisions[-1])

    def test_a_watch_brings_invalidations_and_leaves_out_ones_own_writes_if_asked(self) -> None:
        mine, other = self.connect("me"), self.connect("other")
        before = self.write(other, "1")
        self.write(mine, "2")
        revision = other.invalidate(tags=["new"], remove=True)
        with mine.watch(resume_after=before, exclude_own_writes=True) as watch:
            row = next(message.row for message in watch if isinstance(message, itemcache.Event))
        self.assertEqual((row.revision, row.client_id, list(row.tags)), (revision, "other", ["new"]))
        self.assertEqual((row.kind, row.mode), (INVALIDATION_KIND_TAGS_INVALIDATED, INVALIDATION_MODE_REMOVE))

    def test_a_watch_ends_when_it_is_closed_and_raises_when_no_retry_would_help(self) -> None:
        client = self.connect()
        with self.assertRaises(itemcache.OutOfRangeError):
            list(client.watch(resume_after=1 << 60))
        watch = client.watch(heartbeat=60)
        Following(self, watch).start()
        closing = threading.Thread(target=watch.close)
        closing.start()
        for message in watch:
            self.assertIsInstance(message, itemcache.Heartbeat)
        closing.join()
        watch = client.watch(heartbeat=60)
        Following(self, watch).start()
        client.close()
        with self.assertRaises(itemcache.CancelledError):
            list(watch)
        with self.assertRaises(itemcache.CancelledError):
            client.get("x")
