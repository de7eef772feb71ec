"""The page of recorded rounds: one HTML file that asks for nothing else, as data, style and script are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..support import pages
from ..support.files import write_atomically
from . import page_data
from .file_format import Recording

TEMPLATE = Path(__file__).with_name("page.html")


def page(recordings: Sequence[Recording]) -> str:
    """Returns the page of some rounds.

    What models wrote is in it as JSON without any `<`, so that no text can end the element that holds it, and the
    script puts it into text nodes. The browser runs no other script and loads nothing: the policy in the head allows
    the style and the script by their hashes.
    """
    return pages.render(TEMPLATE, data=[page_data.describe(recording) for recording in recordings])


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
