"""Reference of the contract: writes hooks/REFERENCE.md from the source of `trl_ext_hooks` (`make docs`).

It reads syntax trees, so signatures are those of the source, and nothing is imported.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "trl_ext_hooks"
PAGE = Path(__file__).parent / "REFERENCE.md"
HEAD = """\
# Reference of the contract

<!-- written by `make docs` (hooks/reference.py) from the docstrings of trl_ext_hooks: edit those -->

[README.md](README.md) is the guide. This page lists every hook, the types beside the hooks that use them, and the
toolkit. A hook is a method of a `Plugin` under `@hookimpl`, and takes any of the arguments named here, by name.
Examples leave out `import torch`, `import time`, `from trl_ext_hooks import ...` and `from trl_ext_hooks import ops`.

[Basics](#basics) explains axis letters such as `N` and `T`. Words in the descriptions of hooks:

| words | meaning |
|---|---|
| GRPO, RLOO, DPO | the trainers that call the hook |
| all plugins | every plugin with the hook runs, in order |
| chained | each plugin receives the result of the one before |
| one owner | at most one plugin of a run may implement the hook |
| collective | every process runs it at the same point, so it may gather, in the same order on every process |

"""


class Source:
    """A module of the contract, or of another package.

    Attributes:
        name: Name inside `trl_ext_hooks`, such as `toolkit.groups`, or inside the other folder.
        title, text: Its docstring: what stands before the first colon, and the rest.
    """

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        self.text_of_file = (folder / f"{name.replace('.', '/')}.py").read_text()
        self.tree = ast.parse(self.text_of_file)
        self.title, _, rest = (ast.get_docstring(self.tree) or "").partition(":")
        self.text = rest.strip()[:1].upper() + rest.strip()[1:]

    def lines(self, first: int, last: int) -> str:
        """Returns the lines `first` to `last` of the file, counted from 1."""
        return "\n".join(self.text_of_file.splitlines()[first - 1 : last])

    def public(self) -> Iterator[tuple[str, ast.stmt, str]]:
        """Yields name, statement and docstring of everything public, in the order of the file."""
        for statement, following in zip(self.tree.body, [*self.tree.body[1:], None], strict=True):
            docstring = ""
            if isinstance(statement, ast.ClassDef | ast.FunctionDef):
                name, docstring = statement.name, ast.get_docstring(statement) or ""
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
                name = ast.unparse(target)
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    docstring = str(following.value.value)
            else:
                continue
            # constants without a docstring, such as a long prompt, are details
            if not name.startswith("_") and (docstring or not isinstance(statement, ast.Assign | ast.AnnAssign)):
                yield name, statement, docstring


def sources() -> list[Source]:
    """Returns the modules in the order of the page: the declaration, the trainer, the stages, the basics."""
    return [Source(name) for name in dict.fromkeys(["plugin", "trainer", *hooks().values(), "basics"])]


def toolkit() -> list[Source]:
    """Returns the modules of the toolkit."""
    files = sorted((FOLDER / "toolkit").glob("*.py"))
    return [Source(f"toolkit.{file.stem}") for file in files if not file.stem.startswith("_")]


def hooks() -> dict[str, str]:
    """Returns the module of each hook, in the order of `specs`."""
    tree = ast.parse((FOLDER / "specs.py").read_text())
    assignments = [statement for statement in tree.body if isinstance(statement, ast.Assign)]
    return {ast.unparse(line.targets[0]): ast.unparse(line.value).partition(".")[0][1:] for line in assignments}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """Returns the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def heading(name: str, statement: ast.stmt, module: Source) -> str:
    """Returns the heading of a public name. Those of the toolkit carry their module."""
    place = module.name.rpartition(".")[2] + "." if "." in module.name else ""
    return f"class `{place}{name}`" if isinstance(statement, ast.ClassDef) else f"`{place}{name}`"


def markdown(docstring: str) -> str:
    """Returns a docstring with its sections (`Args:` and others) as lists."""
    head, *sections = re.split(r"^(Args|Attributes|Returns|Raises):\n", docstring, flags=re.MULTILINE)
    blocks = [head.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = re.split(r"\n(?! )", body)  # a section ends where the indentation does
        entries = re.split(r"\n(?= {4}\S)", lines[0].rstrip())
        texts = [" ".join(entry.split()) for entry in entries if entry.strip()]
        if title == "Returns":
            blocks.append(f"Returns: {' '.join(texts)}")
        else:
            names = [re.sub(r"\w[\w.]*", r"`\g<0>`", text.partition(": ")[0]) for text in texts]
            blocks.append(f"{title}:\n")
            blocks[-1] += "".join(
                f"\n- {name}: {text.partition(': ')[2]}" for name, text in zip(names, texts, strict=True)
            )
        blocks += [example(line.strip()) for line in lines[1:] if line.strip()]
    return "\n\n".join(block for block in blocks if block)


def example(block: str) -> str:
    """Returns the section `Example:` as code, and any other block as it is."""
    head, _, session = block.partition("\n")
    return f"{head}\n\n```pycon\n{textwrap.dedent(session)}\n```" if head == "Example:" else block


def first_sentence(docstring: str) -> str:
    """Returns the first sentence of a docstring, on one line."""
    return re.split(r"(?<=\.)\s", docstring.strip(), maxsplit=1)[0]


def signature(function: ast.FunctionDef, module: Source) -> str:
    """Returns the lines of a function up to its body, without the colon."""
    return module.lines(function.lineno, function.body[0].lineno - 1).rstrip().removesuffix(":")


def member(function: ast.FunctionDef, module: Source) -> str:
    """Returns the signature of a method on one line, or the name and type of a property."""
    if "property" in [ast.unparse(decorator) for decorator in function.decorator_list]:
        return f"{function.name}: {ast.unparse(function.returns) if function.returns else 'None'}"
    line = " ".join(signature(function, module).split()).removeprefix("def ")
    return re.sub(r"\(self(, )?", "(", re.sub(r",? \)", ")", line.replace("( ", "(")), count=1)


def described_members(node: ast.ClassDef) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Yields the public methods and properties of a class that have a docstring, `__call__` among them."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and not re.match(r"_(?!_call__)", statement.name):
            docstring = ast.get_docstring(statement)
            if docstring:
                yield statement, docstring


def class_block(node: ast.ClassDef, module: Source) -> str:
    """Returns the fields of a class and its constructor as code; nothing where it has neither."""
    first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
    lines = [module.lines(first, node.lineno)]
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            lines.append(module.lines(statement.lineno, statement.end_lineno or statement.lineno))
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            lines += ["", signature(statement, module)] if len(lines) > 1 else [signature(statement, module)]
    return "" if len(lines) == 1 else "```python\n" + "\n".join(lines) + "\n```\n\n"


def section(name: str, statement: ast.stmt, docstring: str, module: Source) -> str:
    """Returns the section of a public name."""
    level = "####" if "." in module.name else "###"
    text = f"{level} {heading(name, statement, module)}\n\n"
    if isinstance(statement, ast.FunctionDef):
        return text + f"```python\n{signature(statement, module)}\n```\n\n{markdown(docstring)}\n\n"
    if isinstance(statement, ast.ClassDef):
        text += class_block(statement, module) + f"{markdown(docstring)}\n\n"
        members = list(described_members(statement))
        text += "Properties and methods:\n\n" if members else ""
        for method, described in members:
            body = markdown(described).replace("\n", "\n  ").replace("\n  \n", "\n\n")
            text += f"- `{member(method, module)}`\n\n  {body}\n\n"
        return text
    assert isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
    if isinstance(statement.value, ast.Dict):
        rows = ast.literal_eval(statement.value)
        table = "".join(f"| `{key}` | {value} |\n" for key, value in rows.items())
        return text + f"{markdown(docstring)}\n\n| name | meaning |\n|---|---|\n{table}\n"
    code = module.lines(statement.lineno, statement.end_lineno or statement.lineno)
    return text + f"```python\n{code}\n```\n\n{markdown(docstring)}\n\n"


def index(modules: list[Source], tools: list[Source]) -> str:
    """Returns the table of hooks in order, and the list of all other names."""
    by_name = {name: docstring for module in modules for name, _, docstring in module.public()}
    text = "| hook | what it does |\n|---|---|\n"
    text += "".join(f"| [`{hook}`](#{anchor(hook)}) | {first_sentence(by_name[hook])} |\n" for hook in hooks())
    for module in [*modules, *tools]:
        links = [
            f"[`{name}`](#{anchor(heading(name, statement, module))})"
            for name, statement, _ in module.public()
            if name not in hooks()
        ]
        title = f"`trl_ext_hooks.{module.name}`" if module in tools else module.title
        place = f"[{title.replace('trl_ext_hooks.', '')}](#{anchor(title)})"
        text += f"\n- {place}: {', '.join(links)}" if links else ""
    return text + "\n\n"


def page() -> str:
    """Returns the whole page."""
    modules, tools = sources(), toolkit()
    text = HEAD + index(modules, tools)
    for module in modules:
        text += f"## {module.title}\n\n{module.text}\n\n"
        text += "".join(section(*entry, module) for entry in module.public())
    text += (
        "## Toolkit\n\nFunctions that methods share. Import the modules by name: most of them import torch. The tensor "
        "functions are in `trl_ext_hooks.ops` too.\n\n"
    )
    for module in tools:
        docstring = ast.get_docstring(module.tree) or ""
        text += f"### `trl_ext_hooks.{module.name}`\n\n{docstring}\n\n"
        text += "".join(section(*entry, module) for entry in module.public())
    return text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
