"""A self-contained page: text, style, script and data in one file. No text in it can change the page.

The style is `page.css`, the scripts are `page.js` and `heads.js`. A content security policy names them by their SHA-256
and forbids everything else: other scripts, pictures, fonts, connections. Texts reach the page as data, and the script
shows data as text.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
HEADS = Path(__file__).with_name("heads.js").read_text(encoding="utf-8")
MARK = '<meta name="generator" content="Wikipedia Transformer, {kind}">'  # marks a page as ours
NO_SCRIPT = """<noscript><p>This page needs its own script to show pictures and texts. The script is in this file and loads
nothing. A preview, such as that of iPads, iPhones and mail programs, runs no script: open the page in a browser. On an iPad
or iPhone, it must come from a web server.</p></noscript>"""


def render(kind: str, title: str, body: str, data: dict[str, Any]) -> str:
    """The whole page.

    Args:
        kind: for `is_page`: "run" or "text".
        title: any text.
        body: HTML, in which foreign text is escaped already (`html.escape`).
        data: what the scripts show; may hold any text. With "attention" in it the page has heads.js, too.
    """
    scripts = [SCRIPT, HEADS] if "attention" in data else [SCRIPT]
    allowed = " ".join(source_hash(script) for script in scripts)
    policy = (
        f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK.format(kind=kind)}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{NO_SCRIPT}
{body}
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{as_json(data)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""
    return page.encode("utf-8", "replace").decode("utf-8")  # a text from the command line may hold half a character


def is_page(path: Path, kind: str) -> bool:
    """Whether the file is a page of this kind that `render` made."""
    if not path.is_file():  # a device, a pipe
        return False
    with path.open("rb") as file:
        return MARK.format(kind=kind).encode() in file.read(1000)


def source_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def as_json(data: dict[str, Any]) -> str:
    """JSON that cannot end its HTML element: every `<` is escaped."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def facts(rows: dict[str, str]) -> str:
    """Names and texts as an HTML list."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows.items())
    return f"<dl>{items}</dl>"


# A text in the colours of its surprise, for the body of a page
EXPECTED = """<h2>What the model expects</h2><p class="figure"><b id="bits"></b> bits per byte</p>
<p class="text" id="passage" lang="" translate="no" tabindex="0" role="application"
aria-label="the text; arrow keys go from token to token"></p>
<p class="legend" aria-hidden="true">sure <span class="scale"></span> guessing blindly</p>
<p class="note">The colour is the model's surprise at a token in bits: 1 bit where it gave the token an even
chance, 10 bits where it gave it 1 in 1,024. Point at a token, tap it, or go there with the arrow keys, to read its
probability and the likeliest other tokens.</p>
<p class="note">Bits per byte: the total surprise divided by the length of the text in bytes. Compressed by the
model, the text would take that many bits for each byte, so models with different tokenizers can be compared.</p>"""
