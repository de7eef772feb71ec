"""What every run needs and takes long to import; loaded once, in the process that all others are forked from."""

import datasets
from trl import GRPOConfig, GRPOTrainer

from trl_ext.experiments import comparing, preparing

from ..trl_internals import mixins

__all__ = ["GRPOConfig", "GRPOTrainer", "comparing", "datasets", "mixins", "preparing"]
