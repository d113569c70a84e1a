"""Which values of Host are served without a key.

A page in a browser can have its own name resolve to this machine (DNS rebinding) and then read
every reply, since to the browser it talks to its own origin. The name is still in Host. An address
in Host is one that the browser did not look up, so it cannot be rebound.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from starlette.datastructures import Headers

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError

ANY = "*"
_HOST = re.compile(r"(?P<name>[^\[\]:/?#@\s]+|\[[0-9a-f:.]+\])(:\d*)?", re.ASCII)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AllowedHosts:
    """Loopback names and addresses, --host and --allowed-host.

    Unless this process listens on loopback only, also every address and this machine's name.
    """

    def __init__(self, config: ServerConfig, *, host_is_ours: bool = True) -> None:
        """Raises ConfigError for an --allowed-host that Host cannot hold."""
        self._names = {_read_option(name) for name in config.allowed_host}
        self._any_address = not host_is_ours or not is_loopback(config.host)
        if host_is_ours:
            self._names.add(config.host.lower())
        if self._any_address:
            machine = socket.gethostname().lower()
            self._names |= {machine, f"{machine}.local"}

    def allow(self, headers: Headers) -> bool:
        """Whether the request has exactly one Host, and it may be served."""
        if ANY in self._names:
            return True
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if match is None:
            return False
        name = match["name"].strip("[]").removesuffix(".")
        if name in self._names or name.endswith(".localhost") or is_loopback(name):
            return True
        return self._any_address and _address(name) is not None


def is_loopback(host: str) -> bool:
    """Whether a name or an address always means this machine."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(host: str) -> Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _read_option(text: str) -> str:
    name = text.lower().removesuffix(".")
    bracketed = f"[{name}]" if ":" in name else name
    match = _HOST.fullmatch(bracketed)
    if match is None or match["name"] != bracketed:
        raise ConfigError(
            f"--allowed-host is {text!r}; it must be a name or an address without scheme and port"
        )
    return name
