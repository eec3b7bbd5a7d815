"""Which addresses a webhook may be sent to: by default none inside the network we stand in.

A URL of a user's that we call is a way past the firewall (SSRF), so its name is resolved here, the
addresses are checked, and the connection goes to the very address that was checked: a name that
resolves to another one a moment later gains nothing.
"""

import asyncio
import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import SplitResult, urlsplit

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ForbiddenURLError(ValueError):
    """Nothing is sent there."""


def parse_url(url: str) -> SplitResult:
    """The URL in parts.

    Raises:
        ForbiddenURLError: it is none that a webhook can have.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ForbiddenURLError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ForbiddenURLError(f"{url!r} is no http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ForbiddenURLError(
            "a URL with a user or password in it; the signature says who we are"
        )
    if port == 0 or any(c.isspace() or not c.isprintable() for c in url):
        raise ForbiddenURLError(f"{url!r} is no URL that can be called")
    return parts._replace(netloc=_netloc(parts.hostname, port))


def _netloc(host: str, port: int | None) -> str:
    """Host and port in ASCII, as a resolver, a `Host` header and a certificate have them."""
    try:
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        name.encode("ascii")
    except UnicodeError as error:
        works = "labels of 1 to 63 letters, digits and - would work"
        raise ForbiddenURLError(f"{host!r} is no host name ({error}); {works}") from None
    return name if port is None else f"{name}:{port}"


async def resolve_address(parts: SplitResult, *, allow_private: bool) -> tuple[str, int]:
    """An address and port of the URL's host that may be connected to.

    Raises:
        ForbiddenURLError: it has an address in a private network.
        OSError: it has none.
    """
    port = parts.port or _PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private:
        for address in addresses:
            _check(address)
    return addresses[0], port


def _check(address: str) -> None:
    if not is_public(address):
        raise ForbiddenURLError(
            f"its host is at {address}, which is no public address; "
            "WARMSCALE_WEBHOOK_ALLOW_PRIVATE=true allows such"
        )


def is_public(address: str) -> bool:
    """Whether it is an address of the public internet, also once unwrapped from IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return all(each.is_global and not each.is_multicast for each in _unwrapped(ip))


def _unwrapped(ip: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """The address, or the IPv4 addresses that a gateway would make of it."""
    if isinstance(ip, IPv4Address):
        return [ip]
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        inner.append(IPv4Address(int(ip) & 0xFFFFFFFF))
    found: list[IPv4Address | IPv6Address] = [each for each in inner if each is not None]
    return found or [ip]
