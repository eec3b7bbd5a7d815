"""Addresses that webhooks may be sent to: by default only public ones.

A service that calls a user's URL can be used to reach hosts behind the firewall (server-side
request forgery). Therefore the name is resolved here, its addresses are checked, and the connection
goes to a checked address. A name that resolves to another address a moment later has no effect.
"""

import asyncio
import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import SplitResult, urlsplit

_PORTS = {"http": 80, "https": 443}
# A NAT64 gateway forwards these addresses to the IPv4 address in their last 32 bits (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ForbiddenURLError(ValueError):
    """A URL that webhooks are not sent to."""


def parse_url(url: str) -> SplitResult:
    """Split a URL into its parts, with the host name in ASCII.

    Raises:
        ForbiddenURLError: a webhook cannot have this URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ForbiddenURLError(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ForbiddenURLError(f"{url!r} is not an http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ForbiddenURLError(
            "the URL contains a user or a password; receivers check the signature instead"
        )
    # `urlsplit` accepts spaces and control characters; in an HTTP request they would end a line.
    if port == 0 or any(c.isspace() or not c.isprintable() for c in url):
        raise ForbiddenURLError(f"{url!r} is not a URL that can be called")
    return parts._replace(netloc=_make_netloc(parts.hostname, port))


def _make_netloc(host: str, port: int | None) -> str:
    """Return host and port in ASCII, the form of resolvers, `Host` headers and certificates."""
    try:
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        name.encode("ascii")
    except UnicodeError as error:
        works = "labels of 1 to 63 letters, digits and - would work"
        raise ForbiddenURLError(f"{host!r} is not a host name ({error}); {works}") from None
    return name if port is None else f"{name}:{port}"


async def resolve_address(parts: SplitResult, *, allow_private: bool) -> tuple[str, int]:
    """Resolve the URL's host; return an address that is allowed, and the port.

    Raises:
        ForbiddenURLError: an address of the host is in a private network.
        OSError: the host has no address.
    """
    port = parts.port or _PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    # Every address is checked, not only the first: a host with a private one is never called.
    if not allow_private:
        for address in addresses:
            _check_address(address)
    return addresses[0], port


def _check_address(address: str) -> None:
    if not is_public(address):
        raise ForbiddenURLError(
            f"its host has the address {address}, which is not public; "
            "WARMSCALE_WEBHOOK_ALLOW_PRIVATE=true allows private addresses"
        )


def is_public(address: str) -> bool:
    """Return whether an address is public, and every IPv4 address that it embeds."""
    # `%` separates the zone of a link-local address, fe80::1%eth0.
    ip = ipaddress.ip_address(address.partition("%")[0])
    return all(each.is_global and not each.is_multicast for each in _unwrap_address(ip))


def _unwrap_address(ip: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """Return the IPv4 addresses that a gateway would forward to, or the address itself."""
    # Example: ::ffff:10.0.0.1, 2002:a00:1:: and 64:ff9b::a00:1 all lead to 10.0.0.1.
    if isinstance(ip, IPv4Address):
        return [ip]
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        inner.append(IPv4Address(int(ip) & 0xFFFFFFFF))
    found: list[IPv4Address | IPv6Address] = [each for each in inner if each is not None]
    return found or [ip]
