"""Which way does a request go: straight to the server's addresses, or by the proxy that the environment names?

The variables are those that boto3 follows: HTTP_PROXY, HTTPS_PROXY, NO_PROXY, and their names in lower case.
"""

from __future__ import annotations

import base64
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ray_streamer.errors import SettingsError

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Route:
    """Where to connect for one server; equal routes may share connections.

    Attributes:
        scheme: Of the server, "http" or "https".
        netloc: The server, as urls and `Host` name it.
        host: Name or address to connect to, the proxy's if there is one.
        port: Port to connect to.
        is_proxied: Whether `host` is a proxy's.
        authorization: What the proxy wants to know; a secret.
    """

    scheme: str
    netloc: str
    host: str
    port: int
    is_proxied: bool = False
    authorization: str = field(default="", repr=False)

    @property
    def server_host(self) -> str:
        """The server's own name, for certificates."""
        return urlsplit(f"//{self.netloc}").hostname or ""

    @property
    def server_address(self) -> str:
        """The server as CONNECT names it, with its port."""
        has_port = urlsplit(f"//{self.netloc}").port is not None
        return self.netloc if has_port else f"{self.netloc}:{_DEFAULT_PORTS[self.scheme]}"

    @property
    def is_tunnelled(self) -> bool:
        """Whether the proxy must pass on a connection of which it understands nothing."""
        return self.is_proxied and self.scheme == "https"


def is_http_address(url: str) -> bool:
    """Whether a url names a server that can be asked over HTTP, and a port that exists if it names one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def route_of(url: str) -> Route:
    """The way to the server of a url, by the environment as it is now.

    Raises:
        SettingsError: The environment names a proxy that this client cannot use.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        return _proxied(parts.scheme, parts.netloc, proxy)
    return Route(parts.scheme, parts.netloc, parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])


def _proxied(scheme: str, netloc: str, proxy: str) -> Route:
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = parts.port or 80
    except ValueError:
        raise SettingsError(f"{scheme.upper()}_PROXY is no address; give http://HOST:PORT") from None
    if parts.scheme != "http" or not parts.hostname:
        raise SettingsError(
            f"{scheme.upper()}_PROXY begins with {parts.scheme}://, and only http:// proxies work; https servers are "
            "reached through such a proxy, too, by CONNECT"
        )
    authorization = ""
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = f"Basic {base64.b64encode(user.encode()).decode()}"
    return Route(scheme, netloc, parts.hostname, port, is_proxied=True, authorization=authorization)
