"""The live page at ``/ui``: files of this package, nothing from elsewhere and nothing to build.

The page itself holds no figures; it asks ``/stats`` for them.
"""

from importlib import resources

_HTML = b"text/html; charset=utf-8"
_SCRIPT = b"text/javascript; charset=utf-8"

_FILES = {
    "/ui": ("page.html", _HTML),
    "/ui/": ("page.html", _HTML),
    "/ui/style.css": ("style.css", b"text/css; charset=utf-8"),
    "/ui/app.js": ("app.js", _SCRIPT),
    "/ui/view.js": ("view.js", _SCRIPT),
    "/ui/chart.js": ("chart.js", _SCRIPT),
}


def page(path: str) -> tuple[bytes, bytes] | None:
    """Content type and body of what stands at ``path``; None where nothing does."""
    if path not in _FILES:
        return None
    name, content_type = _FILES[path]
    return content_type, resources.files(__name__).joinpath(name).read_bytes()
