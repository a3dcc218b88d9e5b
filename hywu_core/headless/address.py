"""A ComfyUI server's address, what it takes to log in there, and keeping that out of every message."""

from __future__ import annotations

import base64
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from ..errors import HYWUError, get_logger

log = get_logger(__name__)

#: What stands in messages for a secret.
HIDDEN = "***"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST = 4


class Address:
    """``http(s)://[user:password@]host[:port][/path][?token=…]``; without a scheme it is http.

    token: sent as ``Authorization: Bearer …``; a user and password in the address as Basic; what the address
        asks (``?token=…``) goes along with every request.
    Raises HYWUError on another scheme, on no host, and on a token beside a user.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        text = url.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
            port = parts.port
            if scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no http:// address")
        except ValueError as error:
            bare = text.partition("?")[0].rpartition("@")[2]
            raise HYWUError(
                f"The server's address '{bare}' can't be used ({error}); write it as http://HOST:PORT, for "
                "instance http://127.0.0.1:8188."
            ) from error
        if token and parts.username:
            raise HYWUError("Give the server's token or a user in its address, not both.")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        where = f"{host}:{port}" if port is not None else host
        #: The address without anything secret: for requests and for messages.
        self.url = f"{scheme}://{where}{parts.path}".rstrip("/")
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.headers: dict[str, str] = {}
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        elif user:
            both = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.headers["Authorization"] = f"Basic {both}"
        known = {token or "", password, parts.password or "", *self.query.values()}
        known |= {header.partition(" ")[2] for header in self.headers.values()}
        # shorter ones would hide half of each sentence, and the requests' address doesn't hold them
        known = {secret for secret in known if len(secret) >= SHORTEST}
        forms = (form for text in known for form in (text, quote(text, ""), quote_plus(text)))
        self._secrets = sorted(set(forms), key=len, reverse=True)
        if self.logs_in and scheme == "http" and parts.hostname not in LOOPBACK:
            log.warning("the login for %s travels unencrypted; use https where you can", self.url)

    @property
    def socket(self) -> str:
        """The address for websockets."""
        return "ws" + self.url.removeprefix("http")

    @property
    def logs_in(self) -> bool:
        return bool(self.headers or self.query)

    def hide(self, text: object) -> str:
        """The text without any secret of this address."""
        text = str(text)
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text
