"""The files of the page, and the headers that keep anything else from running in it."""

from pathlib import Path

from starlette.responses import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_file(path: str) -> Response:
    """The response to one of the paths in FILES."""
    name, media_type = FILES[path]
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return Response(text, media_type=media_type, headers=HEADERS)
