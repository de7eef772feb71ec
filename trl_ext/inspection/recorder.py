"""The recorder: it writes the first training rounds of a trainer into files, and changes nothing that is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trl_ext_hooks import Curve, Round, Scored, Span, Views

from .._version import __version__
from ..engine.context import Context
from ..engine.stages.kept_rows import KEPT
from ..errors import ConfigError, PluginError
from ..support.console import tell
from ..support.random_state import untouched_random_state
from ..trl_internals import trackers, trainer_state
from . import file_format, tracker_table
from .file_format import Prompt, Recording, RewardStage, Row
from .tokens import decoder, texts

_NOT_SHOWN = ("prompt", "completion", "image", "images")
"""Columns of the data that are shown anyway, or are not text."""


class Recorder:
    """Records the first training rounds of one trainer.

    Args:
        context: The plugins of the trainer.
        folder: Where the files go. Recordings of an earlier run that lie there are replaced.
        rounds: How many rounds.
        max_rows: Rows of a round that are kept: whole groups from the start, and one group at least.
    """

    def __init__(self, context: Context, folder: Path, rounds: int, max_rows: int) -> None:
        self.context = context
        self.folder, self.rounds, self.max_rows = folder, rounds, max_rows
        self.begun = 0
        if context.view.process_index == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"rounds cannot be recorded in {folder}: {error.strerror or error}.") from error

    def begin(self) -> RoundRecord | None:
        """Starts a record if the round that begins is to be recorded. All processes decide alike."""
        if self.begun == self.rounds or trainer_state.mode(self.context.trainer) != "train":
            return None
        self.begun += 1
        return RoundRecord(self)

    def write(self, recording: Recording) -> None:
        """Writes a round, and sends it to trackers. The first one replaces the recordings of an earlier run."""
        if recording.round == 1:
            for old in file_format.files(self.folder):
                old.unlink()
        file_format.write(recording, self.folder)
        trackers.log_table(self.context.trainer, tracker_table.NAME, tracker_table.table(recording))
        if recording.round == 1:
            tell(f"trl_ext: recording rounds. Look at them with: trl_ext inspect {self.folder}")


class RoundRecord:
    """Accumulates one round until it is written."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.context, self.number = recorder, recorder.context, recorder.begun
        self.rewards: list[tuple[RewardStage, torch.Tensor]] = []
        self.advantages: list[tuple[str, torch.Tensor]] = []
        self._decode = decoder(self.context.view.processing_class)
        self._prompts: dict[tuple[int, ...], Prompt] = {}

    def after(self, by: str, state: Scored) -> None:
        """Keeps the rewards of a scored round, or the advantages of a finished one, as `by` left them."""
        if isinstance(state, Round):
            self.advantages.append((by, state.advantages.detach().clone()))
        else:
            stage = RewardStage(by, list(state.reward_names), [number(w) or 0.0 for w in state.reward_weights.tolist()])
            self.rewards.append((stage, state.rewards.detach().clone()))

    def finish(self, round: Round) -> None:
        """Asks the plugins for their views, gathers the kept rows of all processes, and writes. Collective."""
        views = self._views(round)
        # rows of the group -1 only fill up a process
        kept = kept_groups([group for group in round.group_ids.tolist() if group >= 0], self.recorder.max_rows)
        local = [
            self._row(round, index, views[index])
            for index in range(len(round.rows))
            if int(round.group_ids[round.offset + index]) in kept
        ]
        gathered = self.context.view.gather_objects(local)
        if self.context.view.process_index == 0:
            self.recorder.write(self._recording(round, sorted(gathered, key=lambda row: row["row"])))

    def _views(self, round: Round) -> list[dict[str, list[dict[str, Any]]]]:
        """Returns the spans and curves of each local row, checked."""
        by_row: list[dict[str, list[dict[str, Any]]]] = [{"spans": [], "curves": []} for _ in round.rows]
        for index, written in enumerate(round.tool_mask or ()):
            by_row[index]["spans"] += [
                {"by": "TRL", "start": start, "end": end, "label": "tool result", "value": None}
                for start, end in runs_of_zeros(written)
            ]
        with untouched_random_state(), torch.no_grad():
            for name, views in self.context.calls.each("inspect", round=round):
                _expect(name, views, Views)
                for span in views.spans:
                    _expect(name, span, Span)
                    entry = _span(round, name, span)
                    by_row[span.row]["spans"].append(entry)
                for curve in views.curves:
                    _expect(name, curve, Curve)
                    entry = _curve(round, name, curve)
                    by_row[curve.row]["curves"].append(entry)
        return by_row

    def _row(self, round: Round, index: int, views: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a local row as plain values, with its prompt in full."""
        place, ids = round.offset + index, list(round.completion_ids[index])
        prompt = round.batch["prompt_ids"][index][round.batch["prompt_mask"][index].bool()].tolist()
        advantages: list[Any] = []
        for _, values in self.advantages:
            wide = values.dim() == 2
            advantages.append(numbers(values[index, : len(ids)]) if wide else number(values[place].item()))
        kept = round.batch.get(KEPT)
        # what plugins add to the batch: per token it is a track, else a field of the row
        plugin_fields = {field for plugin in self.context.plan.plugins.values() for field in plugin.fields}
        fields: dict[str, Any] = {name: plain(values[index]) for name, values in round.fields.items()}
        per_token: dict[str, Any] = {}
        for name, values in round.batch.items():
            if not isinstance(values, torch.Tensor) or values.dim() == 0 or len(values) != len(round.rows):
                continue
            wide = values.shape == round.loss_mask.shape
            if wide and name != "advantages" and (name in plugin_fields or values.is_floating_point()):
                per_token[name] = numbers(values[index, : len(ids)])
            elif name in plugin_fields:
                fields[name] = plain(values[index])
        return {
            "row": place,
            "group": int(round.group_ids[place]),
            "prompt": self._prompt(prompt),
            "ids": ids,
            "tokens": texts(self._decode, ids, before=prompt),
            "mask": [int(counted) for counted in round.loss_mask[index, : len(ids)].tolist()],
            "rewards": [numbers(values[place]) for _, values in self.rewards],
            "advantages": advantages,
            "columns": {name: plain(value) for name, value in round.rows[index].items() if name not in _NOT_SHOWN},
            "fields": fields,
            "calls": tool_calls(round.completions[index]),
            "kept": kept is None or bool(kept[index]),
            "values": per_token,
            **views,
        }

    def _prompt(self, ids: list[int]) -> Prompt:
        """Returns a prompt token by token. The rows of a group share it."""
        key = tuple(ids)
        if key not in self._prompts:
            self._prompts[key] = Prompt(ids, texts(self._decode, ids))
        return self._prompts[key]

    def _recording(self, round: Round, rows: list[dict[str, Any]]) -> Recording:
        """Puts the rows of all processes together. Each prompt is kept once, and rows refer to its place."""
        prompts: list[Prompt] = []
        places: dict[tuple[int, ...], int] = {}
        for row in rows:
            key = tuple(row["prompt"].ids)
            if key not in places:
                places[key] = len(prompts)
                prompts.append(row["prompt"])
            row["prompt"] = places[key]
        model = self.context.view.unwrapped_model
        return Recording(
            trl_ext=__version__,
            model=str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
            trainer=self.context.kind,
            round=self.number,
            step=round.step,
            processes=self.context.view.num_processes,
            num_generations=round.num_generations,
            left_out=int((round.group_ids >= 0).sum()) - len(rows),
            plugins=[
                {
                    "name": spec.name,
                    "version": spec.version,
                    "options": plain(spec.option_values),
                    "hooks": list(spec.hooks),
                    "claims": sorted(spec.claims),
                }
                for spec in self.context.plan.specs
            ],
            prompts=prompts,
            reward_stages=[stage for stage, _ in self.rewards],
            advantage_stages=[by for by, _ in self.advantages],
            rows=[Row(**row) for row in rows],
        )


def _expect(plugin: str, value: Any, kind: type) -> None:
    """Refuses a value of another type that a plugin returned."""
    if not isinstance(value, kind):
        got = type(value).__name__
        raise PluginError(f"plugin {plugin!r} returned {got} from 'inspect', expected {kind.__name__}.")


def _span(round: Round, plugin: str, span: Span) -> dict[str, Any]:
    """Returns a plugin's span as it is written, checked against the row."""
    what = f"plugin {plugin!r} returned the span {span.label!r} from 'inspect'"
    length = _length(round, what, span.row)
    if not 0 <= span.start < span.end <= length:
        raise PluginError(
            f"{what} with start {span.start} and end {span.end} on row {span.row}, expected 0 <= start < end <= "
            f"{length}, the number of tokens of the completion."
        )
    value = None if span.value is None else number(span.value)
    return {"by": plugin, "start": int(span.start), "end": int(span.end), "label": str(span.label), "value": value}


def _curve(round: Round, plugin: str, curve: Curve) -> dict[str, Any]:
    """Returns a plugin's curve as it is written, checked against the row."""
    what = f"plugin {plugin!r} returned the curve {curve.name!r} from 'inspect'"
    length = _length(round, what, curve.row)
    positions, values = [int(position) for position in curve.positions], [number(value) for value in curve.values]
    if len(positions) != len(values):
        raise PluginError(f"{what} with {len(positions)} positions and {len(values)} values, expected as many of both.")
    if positions != sorted(set(positions)) or not all(0 <= position < length for position in positions):
        raise PluginError(
            f"{what} on row {curve.row} at the positions {positions}, expected ascending ones from 0 to {length - 1}, "
            f"the last token of the completion."
        )
    return {"by": plugin, "name": str(curve.name), "positions": positions, "values": values}


def _length(round: Round, what: str, row: int) -> int:
    """Returns the number of tokens of a local row, which must exist."""
    rows = len(round.completion_ids)
    if not 0 <= row < rows:
        raise PluginError(f"{what} for row {row}, expected a local row, 0 to {rows - 1}.")
    return len(round.completion_ids[row])


def kept_groups(group_ids: Sequence[int], max_rows: int) -> set[int]:
    """Returns the groups from the start whose rows number at most `max_rows`, and the first one in any case."""
    sizes: dict[int, int] = {}
    for group in group_ids:
        sizes[group] = sizes.get(group, 0) + 1
    kept: set[int] = set()
    total = 0
    for group, size in sizes.items():
        total += size
        if kept and total > max_rows:
            break
        kept.add(group)
    return kept


def runs_of_zeros(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, end) of each stretch of zeros.

    >>> runs_of_zeros([1, 0, 0, 1, 0])
    [(1, 3), (4, 5)]
    """
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and not mask[i]) != (i > 0 and not mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def tool_calls(completion: Any) -> list[dict[str, Any]]:
    """Returns the tool calls in a completion's messages, each with its result, in order."""
    calls: list[dict[str, Any]] = []
    if not isinstance(completion, list):
        return calls
    answered = 0
    for message in completion:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            calls.append(
                {"name": str(function.get("name")), "arguments": plain(function.get("arguments")), "result": None}
            )
        if message.get("role") == "tool" and answered < len(calls):
            calls[answered]["result"] = plain(message.get("content"))
            answered += 1
    return calls


def number(value: Any) -> float | None:
    """Rounds a number to six digits, and returns None where it is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def numbers(values: torch.Tensor) -> list[float | None]:
    """Rounds the numbers of a tensor, as `number`."""
    return [number(value) for value in values.detach().tolist()]


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: tensors and arrays as lists, and other things as the name of their type."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return number(value)
    if hasattr(value, "tolist"):  # of torch and of numpy
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return f"<{type(value).__name__}>"
