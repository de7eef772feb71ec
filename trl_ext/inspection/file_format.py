"""The file format of a recorded round: its layout, writing and reading.

`<output_dir>/inspect/round-<k>.json` holds one `Recording`. Numbers are rounded to six digits. What is not a finite
number (a reward that does not apply, a gap in a curve) is null.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError, counted
from ..support.files import write_atomically

FORMAT = 1
FOLDER = "inspect"
_NAME = re.compile(r"round-(\d+)\.json")
HOW = (
    "A run records rounds when it is asked to:\n"
    "  trl_ext train --plugin gdpo --inspect 2 ...     the first two rounds, into OUTPUT_DIR/inspect\n"
    "  trl_ext inspect --plugin gdpo ...               one round now, without a run"
)


@dataclasses.dataclass(frozen=True)
class RewardStage:
    """The columns of the rewards as TRL (the reward functions) or a plugin left them."""

    by: str
    names: list[str]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt token by token. Rows refer to it by its place in the list."""

    ids: list[int]
    tokens: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One completion.

    Attributes:
        row: Its number among the rows of all processes.
        group: Its group.
        prompt: Which prompt.
        ids, tokens, mask: Per token: id, text, and 1 where the loss counts it. A token that is only the beginning of a
            character has no text. The one that completes the character has it.
        rewards: Per reward stage, one value per column.
        advantages: Per advantage stage, one number, or one per token.
        columns: What the data set says about the row.
        fields: What plugins say about it (`annotate` and `batch_fields`).
        kept: Whether the round learns from the row. False where `keep_rows` or `token_mask` left it out.
        calls: Tool calls: `name`, `arguments`, `result`.
        values: By name, one number per token, such as `old_per_token_logps`.
        spans: `by`, `start`, `end`, `label`, `value`.
        curves: `by`, `name`, `positions`, `values`.
    """

    row: int
    group: int
    prompt: int
    ids: list[int]
    tokens: list[str]
    mask: list[int]
    rewards: list[list[float | None]]
    advantages: list[float | list[float]]
    columns: dict[str, Any]
    fields: dict[str, Any]
    kept: bool
    calls: list[dict[str, Any]]
    values: dict[str, list[float | None]]
    spans: list[dict[str, Any]]
    curves: list[dict[str, Any]]

    def advantage(self, stage: int) -> float:
        """Returns the advantage of the row. Token-wise ones are averaged over the tokens that the loss counts."""
        advantage = self.advantages[stage]
        if not isinstance(advantage, list):
            return advantage
        in_loss = [value for value, use in zip(advantage, self.mask, strict=True) if use]
        return sum(in_loss) / max(1, len(in_loss))

    def token_advantages(self, stage: int) -> list[float | None]:
        """Returns an advantage for each token, None on tokens that the loss does not count."""
        advantage = self.advantages[stage]
        values = advantage if isinstance(advantage, list) else [advantage] * len(self.mask)
        return [value if use else None for value, use in zip(values, self.mask, strict=True)]

    def total(self, stage: int, weights: Sequence[float]) -> float | None:
        """Returns the weighted sum of the rewards that apply, None where none does."""
        pairs = [(value, weight) for value, weight in zip(self.rewards[stage], weights, strict=True)]
        applying = [value * weight for value, weight in pairs if value is not None]
        return sum(applying) if applying else None


@dataclasses.dataclass(frozen=True)
class Recording:
    """One round.

    Attributes:
        trl_ext, model: The version that wrote it and the model that was trained.
        trainer: `grpo` or `rloo`.
        round: Its number among the recorded ones, from 1.
        step: Optimizer steps taken before it.
        processes, num_generations: Of the run.
        left_out: Rows of the round that were not recorded.
        plugins: `name`, `version`, `options`, `hooks` and `claims`, in the order in which they act.
        prompts: The different prompts.
        reward_stages: Rewards of the reward functions, then of every plugin that changed them.
        advantage_stages: Who made the advantages: `TRL`, then every plugin that changed them.
        rows: The completions, in whole groups.
    """

    trl_ext: str
    model: str
    trainer: str
    round: int
    step: int
    processes: int
    num_generations: int
    left_out: int
    plugins: list[dict[str, Any]]
    prompts: list[Prompt]
    reward_stages: list[RewardStage]
    advantage_stages: list[str]
    rows: list[Row]
    format: int = FORMAT

    def notes(self) -> list[str]:
        """Returns what a reader has to know besides the numbers."""
        notes = []
        if self.left_out:
            notes.append(f"not recorded: {counted(self.left_out, 'further row')} of the round.")
        for plugin in self.plugins:
            if "no_advantages" in plugin["claims"]:
                notes.append(f"{plugin['name']} trains without advantages: those of this round are not used.")
            elif "advantages" in plugin["hooks"] and plugin["name"] not in self.advantage_stages:
                notes.append(f"{plugin['name']} left the advantages of this round as they were.")
        return notes

    def groups(self) -> dict[int, list[Row]]:
        """Returns the rows of each group, in order."""
        groups: dict[int, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups

    def telling_group(self) -> int:
        """Returns the first group whose rows end with different advantages, or the first one."""
        for group, members in self.groups().items():
            if len({row.advantage(-1) for row in members}) > 1:
                return group
        return self.rows[0].group

    def scale(self, stage: int) -> float:
        """Returns the largest magnitude of an advantage in the round, 1 where all are 0."""
        values = (abs(value) for row in self.rows for value in row.token_advantages(stage) if value is not None)
        return max(values, default=0.0) or 1.0


def write(recording: Recording, folder: Path) -> Path:
    """Writes the file of a round, whole or not at all, and returns it."""
    path = folder / f"round-{recording.round}.json"
    write_atomically(path, json.dumps(dataclasses.asdict(recording), separators=(",", ":"), allow_nan=False) + "\n")
    return path


def files(folder: Path) -> list[Path]:
    """Returns the recordings in a folder, by round."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def find(place: str) -> list[Path]:
    """Returns the recordings behind an argument: a file, a folder of recordings, or the output folder of a run.

    Raises:
        ConfigError: There are none.
    """
    path = Path(place)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{place}: there is no such file or folder (looked in {Path.cwd()}).")
    for folder in (path / FOLDER, path):
        if folder.is_dir() and (paths := files(folder)):
            return paths
    raise ConfigError(f"{place} holds no recorded rounds (round-1.json, ..., here or in {FOLDER}/). {HOW}")


def read(path: Path) -> Recording:
    """Reads one file.

    Raises:
        ConfigError: It cannot be read, is not a recording, is damaged, or was written by a newer trl_ext.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a recorded round (invalid JSON: {error}). {HOW}") from error
    if not (isinstance(content, Mapping) and isinstance(content.get("format"), int)):
        raise ConfigError(f"{path} is not a recorded round (it has no number `format`). {HOW}")
    if content["format"] > FORMAT:
        raise ConfigError(
            f"{path} was written by trl_ext {content.get('trl_ext', '(unknown)')} in format {content['format']}. This "
            f"trl_ext {__version__} reads formats up to {FORMAT}. Install the newer one: pip install --upgrade trl_ext"
        )
    try:
        recording = _build(content)
        problem = next(_problems(recording), None)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}. Record the round again.") from error
    if problem is not None:
        raise ConfigError(f"{path} is damaged: {problem}. Record the round again.")
    return recording


def _build(content: Mapping[str, Any]) -> Recording:
    nested = {
        "prompts": [Prompt(**entry) for entry in content["prompts"]],
        "reward_stages": [RewardStage(**entry) for entry in content["reward_stages"]],
        "rows": [Row(**entry) for entry in content["rows"]],
    }
    return Recording(**{**content, **nested})


def _problems(recording: Recording) -> Iterator[str]:
    """Says what does not fit together in a file that was cut or edited."""
    if not recording.rows:
        yield "it has no rows"
    if not (recording.reward_stages and recording.advantage_stages):
        yield "it has no rewards or no advantages"
    columns = [len(stage.names) for stage in recording.reward_stages]
    for row in recording.rows:
        length, name = len(row.ids), f"row {row.row}"
        if not length == len(row.tokens) == len(row.mask) or any(len(v) != length for v in row.values.values()):
            yield f"{name} has {length} token ids and another number of texts, masks or values"
        if not 0 <= row.prompt < len(recording.prompts):
            yield f"{name} has prompt {row.prompt} of {len(recording.prompts)}"
        if [len(values) for values in row.rewards] != columns:
            yield f"{name} has rewards for other columns than the round"
        wide = [values for values in row.advantages if isinstance(values, list)]
        if len(row.advantages) != len(recording.advantage_stages) or any(len(values) != length for values in wide):
            yield f"{name} has advantages for other stages or tokens than the round"
        if any(not 0 <= span["start"] < span["end"] <= length for span in row.spans):
            yield f"{name} has a span outside its {length} tokens"
        if any(len(curve["positions"]) != len(curve["values"]) for curve in row.curves):
            yield f"{name} has a curve with fewer values than positions"
