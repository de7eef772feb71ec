"""What every run needs and takes long to import. It is loaded once, in the process that all others are forked from."""

import datasets
from trl import GRPOConfig, GRPOTrainer

from trl_ext.compare import prepare, run_one
from trl_ext.trl_internals import mixins

__all__ = ["GRPOConfig", "GRPOTrainer", "datasets", "mixins", "prepare", "run_one"]
