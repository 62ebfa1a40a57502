"""The page with a text box: one file, with headers that let it load nothing and speak to its own server alone."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


@functools.cache
def policy(text: str) -> str:
    """The content security policy: the page's own script and style, by their hashes."""

    def of(tag: str) -> str:
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {of('script')}; style-src {of('style')}; img-src data:; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )


def page() -> Response:
    text = FILE.read_text(encoding="utf-8")
    headers = {"content-security-policy": policy(text), "referrer-policy": "no-referrer"}
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)
