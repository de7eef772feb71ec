"""Recorded rounds as one HTML file that asks for nothing else: data, style and script are in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..support.files import write_atomically
from .recording import Recording

_HERE = Path(__file__).parent
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>trl_ext inspect</title>
<style>{style}</style>
</head>
<body>
<main></main>
<noscript>This page draws itself with JavaScript. In a terminal, trl_ext inspect FOLDER prints the same.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def page(recordings: Sequence[Recording]) -> str:
    """The page of some rounds.

    What models wrote is in it as JSON without any `<`, so that no text can end the element that holds it, and the
    script puts it into text nodes. The browser runs no other script and loads nothing: the policy in the head allows
    the style and the script by their hashes.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    rounds = [dataclasses.asdict(recording) | {"notes": recording.notes()} for recording in recordings]
    data = json.dumps(rounds, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    return _PAGE.format(policy=policy, style=style, script=script, data=data)


def write(recordings: Sequence[Recording], path: Path) -> None:
    """Writes the page.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        write_atomically(path, page(recordings))
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written to {path}: {error.strerror or error}. --html PATH writes it elsewhere."
        ) from error


def _hash(text: str) -> str:
    """A source of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
