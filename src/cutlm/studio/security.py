"""Who may send requests: those who know the token, from this page, to this address.

The studio reads and writes files and starts training, so that no other web page, other user of the machine or other
machine may use it:

- The address that the command prints has a random token. Opening it sets a cookie that the browser sends only with
  requests of the studio's own page (`SameSite=Strict`) and that no script can read.
- Requests with a `Host` of another name are refused (DNS rebinding), and so are changes without the studio's `Origin`.
- The content security policy allows only the studio's own scripts and styles, so that text from data is never code.
"""

import asyncio
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# No page of the studio sends more: a judgment and an improved response.
MAX_BODY = 8 * 2**20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # without a referrer, browsers send the login form without its origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LOGIN = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>cutlm studio</title></head><body><main><h1>cutlm studio</h1><p role="alert">{problem}</p>
<form method="post" action="/login"><label>Password <input name="password" type="password" required autofocus
autocomplete="current-password"></label> <button>Open</button></form></main></body></html>"""

_ENTRY = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/"><title>cutlm studio</title>
</head><body><p><a href="/">Open the studio</a></p></body></html>"""


@dataclass(frozen=True)
class Access:
    """How to reach the studio.

    Attributes:
        host: The address that the server listens at.
        port: Its port.
        password: Of a server that other machines can reach; None for a local one.
        token: The secret in the address and the cookie.
    """

    host: str
    port: int
    password: str | None = None
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie(self) -> str:
        """The name of the cookie. Browsers send cookies to all ports of a host."""
        return f"cutlm-studio-{self.port}"

    @property
    def url(self) -> str:
        """The address to open."""
        host = self.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/?token={self.token}"

    def accepts_host(self, header: str) -> bool:
        """Whether a `Host` header names this server."""
        name, port = _split_host(header)
        if port is not None and port != self.port and self.password is None:
            return False
        if name in LOOPBACK or name == self.host:
            return True
        if self.password is None:
            return False
        # Names that an attacker owns can point here, addresses cannot.
        return name in (socket.gethostname().lower(), socket.getfqdn().lower()) or _is_address(name)

    def accepts_origin(self, headers: Headers, method: str) -> bool:
        """Whether a request comes from the studio's own page, or is typed into the address bar."""
        site = headers.get("sec-fetch-site", "none")
        if site == "cross-site" or (method not in ("GET", "HEAD") and site not in ("same-origin", "none")):
            return False
        origin = headers.get("origin")
        if origin is None:
            return method in ("GET", "HEAD")
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc == headers.get("host")

    def knows_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _split_host(header: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{header}")
        return (parts.hostname or "").lower(), parts.port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Refuses requests that are not from the studio's own page, and adds the security headers to every answer."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access
        self._login = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        receive = _limit(receive)
        request = Request(scope, receive)
        answer = await self._check(request)
        if answer is None:
            await self._app(scope, receive, send_guarded)
        else:
            await answer(scope, receive, send_guarded)

    async def _check(self, request: Request) -> Response | None:
        """Return the answer to a request that must not reach the studio."""
        access, headers = self._access, request.headers
        if not access.accepts_host(headers.get("host", "")):
            return PlainTextResponse("Refused: another Host than this server's.", 403)
        token = request.query_params.get("token")
        is_entry = request.url.path == "/" and request.method == "GET"
        if is_entry and token is not None and access.knows_token(token):
            return self._let_in()
        if not access.accepts_origin(headers, request.method):
            return PlainTextResponse("Refused: the request comes from another page.", 403)
        if int(headers.get("content-length") or 0) > MAX_BODY:
            return PlainTextResponse("Refused: too large.", 413)
        if request.url.path == "/login" and request.method == "POST" and access.password is not None:
            return await self._log_in(request)
        if access.knows_token(request.cookies.get(access.cookie, "")):
            return None
        if access.password is not None and request.url.path == "/":
            return HTMLResponse(_LOGIN.format(problem=""), 401)
        return PlainTextResponse(
            "Refused: the address needs the token that cutlm studio printed when it started; open that address.", 403
        )

    async def _log_in(self, request: Request) -> Response:
        fields = parse_qs((await request.body())[:4096].decode("utf-8", "replace"))
        given = fields.get("password", [""])[0]
        async with self._login:  # one try at a time, and a second after each wrong one
            if hmac.compare_digest(given.encode(), str(self._access.password).encode()):
                return self._let_in()
            await asyncio.sleep(1)
        return HTMLResponse(_LOGIN.format(problem="Wrong password."), 401)

    def _let_in(self) -> Response:
        # The page continues to the address without the token. After a redirect from the page of another site, such as a
        # terminal in the browser, the cookie would not be sent.
        answer = HTMLResponse(_ENTRY)
        answer.set_cookie(self._access.cookie, self._access.token, httponly=True, samesite="strict")
        return answer


def _limit(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Stop reading a body that is longer than it may be, whatever its header says."""
    num_bytes = 0

    async def receive_limited() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return message if num_bytes <= MAX_BODY else {"type": "http.disconnect"}

    return receive_limited
