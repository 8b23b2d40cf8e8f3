"""Where and how to connect, for both kinds of channels."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import grpc

from itemcache import errors

#: The gRPC service config that ItemCache publishes: UNAVAILABLE is retried, at most three times within half a
#: second. It is safe for writes that carry a ``request_id``, as all of this client do.
SERVICE_CONFIG = files("itemcache").joinpath("service_config.json").read_text("utf-8")

#: The largest answer is a batch of 500 items of 256 KiB.
_MAX_ANSWER_BYTES = 160 * 1024 * 1024

_MAX_TIMEOUT = 24 * 3600.0

ChannelOptions = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Tls:
    """Certificates in PEM. Without any: what gRPC trusts."""

    #: Whom to trust.
    ca: bytes | None = None
    #: The client's own certificate chain, for mTLS; with ``key``.
    cert: bytes | None = None
    key: bytes | None = None
    #: The name that the service's certificate must have. Default: the host of the target.
    server_name: str | None = None


@dataclass(frozen=True)
class Settings:
    """What a channel is made of, checked."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: list[tuple[str, Any]]
    metadata: tuple[tuple[str, str], ...]
    timeout: float


def settings(
    target: str | Sequence[str],
    *,
    tenant: str | None,
    client_id: str | None,
    timeout: float,
    tls: bool | Tls,
    has_token: bool,
    channel_options: ChannelOptions,
) -> Settings:
    """Check what a client was given. Raises InvalidArgumentError for what cannot be."""
    address, local = _address([target] if isinstance(target, str) else list(target))
    if has_token and not tls and not local:
        raise errors.invalid("a token is sent to other machines with TLS only")
    metadata = [
        (name, value)
        for name, value in (("x-tenant-id", tenant), ("x-client-id", client_id))
        if value is not None
    ]
    if not all(value.isascii() and value.isprintable() for _, value in metadata):
        raise errors.invalid("tenant and client id are printable ASCII characters")
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", SERVICE_CONFIG),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
        # gRPC would wait up to two minutes before it tries an instance again that was restarted.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
    ]
    if local:
        # A proxy of the environment cannot reach this machine's own addresses.
        options.append(("grpc.enable_http_proxy", 0))
    credentials = None
    if tls:
        given = tls if isinstance(tls, Tls) else Tls()
        credentials = grpc.ssl_channel_credentials(given.ca, given.key, given.cert)
        if given.server_name is not None:
            options.append(("grpc.ssl_target_name_override", given.server_name))
            options.append(("grpc.default_authority", given.server_name))
    # Of several with one name the last counts.
    options = list({**dict(options), **dict(channel_options)}.items())
    return Settings(address, credentials, options, tuple(metadata), checked_timeout(timeout))


def checked_timeout(timeout: float) -> float:
    """Return it, or a day if it is more, if it is a time."""
    if timeout > 0:
        # gRPC's own time ends somewhere beyond; nobody waits for longer.
        return min(timeout, _MAX_TIMEOUT)
    raise errors.invalid(f"a timeout is more than 0 seconds, got {timeout}", "INVALID_TIMEOUT")


def _address(targets: Sequence[str]) -> tuple[str, bool]:
    """Return the one target for gRPC, and whether what is sent there stays on this machine."""
    if not targets or "" in targets:
        raise errors.invalid("a target must not be empty", "INVALID_TARGET")
    if len(targets) == 1:
        (only,) = targets
        return only, only.startswith(("unix:", "unix-abstract:")) or _is_loopback(only)
    # gRPC for Python takes several addresses only as numbers, and all of one kind.
    found = [_number(target) for target in targets]
    kinds = {ip.version for ip, _ in found}
    if len(kinds) != 1:
        raise errors.invalid("several targets are all IPv4 or all IPv6 addresses", "INVALID_TARGET")
    addresses = ",".join(f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}" for ip, port in found)
    return f"ipv{kinds.pop()}:{addresses}", all(ip.is_loopback for ip, _ in found)


def _number(target: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, _, port = target.rpartition(":")
    try:
        return ipaddress.ip_address(host.strip("[]") if host != "localhost" else "127.0.0.1"), int(port)
    except ValueError:
        raise errors.invalid(
            f"several targets are numeric addresses, as 10.0.0.1:50051, got {target}; use one name that has several",
            "INVALID_TARGET",
        ) from None


def _is_loopback(target: str) -> bool:
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        if target.startswith(scheme):
            target = target[len(scheme) :]
            break
    for address in target.split(","):
        host = (
            address
            if address.count(":") > 1 and "]" not in address
            else address.rpartition(":")[0] or address
        )
        try:
            if host != "localhost" and not ipaddress.ip_address(host.strip("[]")).is_loopback:
                return False
        except ValueError:
            return False
    return True
