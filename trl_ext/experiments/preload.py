"""What every run needs and takes long to import; loaded once, in the process that all others are forked from."""

import accelerate
import datasets
import peft
import torch
import transformers
from trl import GRPOConfig, GRPOTrainer

from trl_ext import api
from trl_ext.compat import mixins, scripts

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "accelerate",
    "api",
    "datasets",
    "mixins",
    "peft",
    "scripts",
    "torch",
    "transformers",
]
