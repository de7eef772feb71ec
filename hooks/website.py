"""The documentation as plain static pages, and as `llms.txt`: `make site` writes both into build/site.

The pages are the Markdown files and notebooks of the repository, the hook reference, and a reference of the Python API
from its docstrings. The packages are not imported. A link that leads nowhere fails the build.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name, get_lexer_for_filename
from pygments.util import ClassNotFound

import reference

ROOT = Path(__file__).parents[1]
FOLDERS = ("trl_ext", "plugins", "hooks", "recipes")
"""Folders whose Markdown files are pages, beside those at the top."""
GROUPS = {
    "Methods": r"plugins/",
    "Reference": r"hooks/REFERENCE\.md|API\.md|trl_ext/GUARANTEES\.md",
    "The project": r"trl_ext/README\.md|trl_ext/shared_prefix/|CONTRIBUTING\.md|CHANGELOG\.md",
    "Guides": r"",
}
"""Groups of pages, with what the paths of their pages begin with. The first that fits is taken."""
PICTURES = {".png", ".jpg", ".svg", ".gif"}
API = {"trl_ext": ROOT / "trl_ext", "trl_ext.testing": ROOT / "trl_ext" / "testing"}
"""Packages on the page of the API, with their folders. The contract has a page of its own."""
API_HEAD = """\
# The Python API

What a script or a test imports, from its docstrings. [The hook reference](hooks/REFERENCE.md) describes
`trl_ext_hooks`, against which methods are written. [The promises](trl_ext/GUARANTEES.md#what-is-stable) say how stable
each part is.

"""


@dataclasses.dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        path: The Markdown file or notebook, from the root of the repository.
        text: Its Markdown.
    """

    path: str
    text: str

    @property
    def url(self) -> str:
        """The file of the site that shows the page."""
        return re.sub(r"(README)?\.md$", lambda end: "index.html" if end[1] else ".html", self.markdown)

    @property
    def markdown(self) -> str:
        """The file of the site that holds the Markdown."""
        return re.sub(r"ipynb$", "md", self.path)

    @property
    def group(self) -> str:
        """The group under which the page is listed."""
        return next(name for name, pattern in GROUPS.items() if re.match(pattern, self.path))

    @functools.cached_property
    def tokens(self) -> list[Token]:
        """The parsed Markdown."""
        return parser().parse(self.text)

    @property
    def title(self) -> str:
        """The text of the first heading."""
        return next(self._texts("heading_open"), self.path)

    @property
    def summary(self) -> str:
        """The beginning of the first paragraph: one sentence, or more where that is a short one."""
        paragraph = next(filter(None, self._texts("paragraph_open")), "")
        found = re.match(r".{40,}?\.(?=\s|$)", paragraph)
        return found[0] if found else paragraph

    def _texts(self, kind: str) -> Iterator[str]:
        for token, inline in zip(self.tokens, self.tokens[1:], strict=False):
            if token.type == kind and token.level == 0:
                yield plain(inline)


def pages() -> dict[str, Page]:
    """Returns all pages by path. The generated ones are written anew, so they are never stale."""
    files = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    notebooks = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.ipynb")]
    texts |= {file.relative_to(ROOT).as_posix(): notebook(file) for file in notebooks}
    texts |= {"hooks/REFERENCE.md": reference.page(), "API.md": api()}
    order = ["README.md", *sorted(texts.keys() - {"README.md"}, key=lambda path: ("README" not in path, path))]
    return {path: Page(path, texts[path]) for path in order}


def notebook(file: Path) -> str:
    """Returns the cells of a notebook as Markdown."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(file.read_text("utf-8"))["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells) + "\n"


# --- the Python API ---------------------------------------------------------------------------------------------------


def exported(folder: Path) -> dict[str, str]:
    """Returns what the `__init__.py` of a package lists in `__all__`, with the module that defines it."""
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    modules = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return {name: modules[name] for name in names if not name.startswith("_")}


def api() -> str:
    """Returns the page of the API: for each package an index, the functions, and the classes."""
    text = API_HEAD
    for package, folder in API.items():
        entries = []
        for name, module in exported(folder).items():
            *path, stem = module.split(".")
            source = reference.Source(stem, folder.joinpath(*path))
            entries += [(*entry, source) for entry in source.public() if entry[0] == name]
        entries.sort(key=lambda entry: isinstance(entry[1], ast.ClassDef))
        text += f"## `{package}`\n\n| name | |\n|---|---|\n"
        for name, statement, docstring, source in entries:
            link = reference.anchor(reference.heading(name, statement, source))
            text += f"| [`{name}`](#{link}) | {reference.first_sentence(docstring)} |\n"
        text += "\n" + "".join(reference.section(*entry) for entry in entries)
    return text


# --- from Markdown to HTML --------------------------------------------------------------------------------------------


@functools.cache
def parser() -> MarkdownIt:
    """Returns the reader of Markdown as GitHub has it. Wide tables scroll inside a box of their own."""
    markdown = MarkdownIt("commonmark", {"highlight": lambda code, language, _: colored(code, language)})
    markdown.enable("table")
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return markdown


def colored(code: str, language: str, file: str = "") -> str:
    """Returns code with colours, by the name of its language or of its file."""
    try:
        lexer = get_lexer_for_filename(file) if file else get_lexer_by_name(language)
    except ClassNotFound:
        lexer = TextLexer()
    return highlight(code, lexer, HtmlFormatter(nowrap=True))


def plain(inline: Token) -> str:
    """Returns the words of a heading or paragraph, without pictures."""
    words = {"text", "code_inline"}
    return "".join(
        child.content if child.type in words else " " if child.type == "softbreak" else ""
        for child in inline.children or []
    )


class Site:
    """The site while it is written.

    Attributes:
        pages: The pages by path.
        files: Other files of the repository that pages link to.
    """

    def __init__(self, folder: Path, pages: Mapping[str, Page]) -> None:
        self.folder = folder
        self.pages = pages
        self.files: set[str] = set()
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
        )
        self.template = environment.get_template("website.html")

    def write(self) -> None:
        """Writes all pages, the files that they link to, the style, and the texts for language models."""
        for page in self.pages.values():
            self._put(page.markdown, page.text)
            self._show(page.url, page.title, page.summary, self.body(page))
        for name in sorted(self.files):
            source = ROOT / name
            self._put(name, source.read_bytes())
            if source.suffix not in PICTURES:
                code = colored(source.read_text(encoding="utf-8"), "", source.name)
                self._show(f"{name}.html", name, "", f"<h1>{name}</h1>\n<pre><code>{code}</code></pre>")
        light, dark = (HtmlFormatter(style=style).get_style_defs("pre") for style in ("default", "github-dark"))
        style = Path(__file__).with_name("website.css").read_text(encoding="utf-8")
        self._put("style.css", f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{style}")
        self._put("llms.txt", index(list(self.pages.values())))
        self._put("llms-full.txt", "\n\n".join(f"<!-- {page.path} -->\n\n{page.text}" for page in self.pages.values()))

    def body(self, page: Page) -> str:
        """Returns a page as HTML: headings have the anchors of GitHub, and links lead to pages of the site."""
        tokens = parser().parse(page.text)
        slugs: list[str] = []
        for token, inline in zip(tokens, [*tokens[1:], None], strict=True):
            if token.type == "heading_open" and inline is not None:
                slug = reference.anchor(plain(inline))
                token.attrSet("id", f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
                slugs.append(slug)
            for child in [token, *(token.children or [])]:
                for attribute in ("href", "src"):
                    if attribute in child.attrs:
                        child.attrSet(attribute, self.link(str(child.attrs[attribute]), page))
                if child.type in ("html_block", "html_inline"):
                    child.content = re.sub(
                        r'\b(href|src)="([^"]+)"',
                        lambda found: f'{found[1]}="{self.link(found[2], page)}"',
                        child.content,
                    )
        return parser().renderer.render(tokens, parser().options, {})

    def link(self, link: str, page: Page) -> str:
        """Returns a link of a page as the site has it. One that leads nowhere stays as it is, and `check` finds it."""
        name, hash_sign, anchor = link.partition("#")
        if not name or re.match(r"[a-z]+:", link):
            return link
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), name))
        if target not in self.pages and f"{target}/README.md" in self.pages:
            target = f"{target}/README.md"
        if target in self.pages:
            url = self.pages[target].url
        elif not target.startswith("..") and (ROOT / target).is_file():
            self.files.add(target)
            url = target if Path(target).suffix in PICTURES else f"{target}.html"
        else:
            return link
        return posixpath.relpath(url, posixpath.dirname(page.url) or ".") + hash_sign + anchor

    def _show(self, url: str, title: str, summary: str, body: str) -> None:
        root = posixpath.relpath(".", posixpath.dirname(url) or ".") + "/"
        groups = {group: [page for page in self.pages.values() if page.group == group] for group in shown_groups()}
        html = self.template.render(title=title, summary=summary, body=body, root=root, groups=groups, url=url)
        self._put(url, html)

    def _put(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def shown_groups() -> list[str]:
    """Returns the groups in the order in which they are listed: guides first."""
    return sorted(GROUPS, key=lambda group: group != "Guides")


def index(pages: Sequence[Page]) -> str:
    """Returns `llms.txt`: one line for every page, with links to the Markdown."""
    text = f"# {pages[0].title}\n\n> {pages[0].summary}\n"
    for group in shown_groups():
        text += f"\n## {group}\n\n"
        for page in pages:
            if page.group == group:
                text += f"- [{page.title}]({page.markdown}){': ' if page.summary else ''}{page.summary}\n"
    return text


# --- the check --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The anchors and the links of a page.

    Attributes:
        ids: Its anchors.
        links: Where its links and pictures lead.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.add(values["id"])
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def check(folder: Path) -> list[str]:
    """Returns the links of all pages in a folder that lead to no file or anchor in it. Other sites are not asked."""
    found = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    broken = []
    for path, page in found.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if re.match(r"[a-z]+:", link):
                continue
            lost = anchor and (target not in found or anchor not in found[target].ids)
            if not target.is_file() or not target.is_relative_to(folder) or lost:
                broken.append(f"{path.relative_to(folder)}: {link}")
    return broken


def build(folder: Path) -> list[str]:
    """Writes the site into a folder, which is emptied first, and returns its broken links."""
    shutil.rmtree(folder, ignore_errors=True)
    Site(folder, pages()).write()
    return check(folder.resolve())


if __name__ == "__main__":
    destination = ROOT / "build" / "site"
    broken_links = build(destination)
    if broken_links:
        sys.exit("these links lead nowhere:\n" + "\n".join(f"  {link}" for link in broken_links))
    print(f"{destination / 'index.html'}")
