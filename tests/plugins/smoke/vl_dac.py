"""VL-DAC needs an environment, and a model whose template can call its tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_ext.testing import calls, tiny_model

OPTIONS = {"head_sizes": [8], "value_warmup_iterations": 1, "outcome_weight": 1.0}


class Corridor:
    """Three steps lead to its end, which is worth 1."""

    def __init__(self) -> None:
        self.total_reward = 0.0
        self.done = False
        self._place = 0

    def reset(self, **row: Any) -> str:
        self.total_reward, self.done, self._place = 0.0, False, 0
        return "@0"

    def step(self) -> str:
        """
        Goes on.

        Returns:
            Where that leads
        """
        self._place += 1
        self.done = self._place >= 3
        self.total_reward = float(self.done)
        return f"@{self._place}"


def settings(kind: str, folder: Path) -> dict[str, Any]:
    model = tiny_model(folder / "tool-model", tools=True)
    return {
        "model": model,
        "trainer": {"environment_factory": Corridor},
        "max_completion_length": 150,
        "max_tool_calling_iterations": 4,
        "generation_kwargs": calls(model, "step", likelihood=5.0),
    }
