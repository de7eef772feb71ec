"""Hooks in the order of the documentation, each from the module of its stage.

The docstring of a hook is the contract: when and where it runs, what it receives, and what its result means. A plugin
implements a hook as a method under `@hookimpl` that takes any of the arguments named here, by name.
"""

from __future__ import annotations

from . import campaign as _campaign
from . import loss as _loss
from . import pairs as _pairs
from . import rollout as _rollout
from . import scoring as _scoring
from . import setup as _setup
from . import side_rows as _side_rows
from . import views as _views

configure = _setup.configure
trainer_arguments = _setup.trainer_arguments
reward_columns = _scoring.reward_columns
setup = _setup.setup
teardown = _setup.teardown
select_rows = _rollout.select_rows
rollout = _rollout.rollout
annotate = _rollout.annotate
rewards = _scoring.rewards
advantages = _scoring.advantages
mix_advantages = _scoring.mix_advantages
keep_rows = _scoring.keep_rows
token_mask = _scoring.token_mask
token_weights = _scoring.token_weights
batch_fields = _scoring.batch_fields
hidden_positions = _loss.hidden_positions
logps = _loss.logps
loss_inputs = _loss.loss_inputs
side_batch = _side_rows.side_batch
step_statistics = _loss.step_statistics
policy_loss = _loss.policy_loss
loss_terms = _loss.loss_terms
optimizer_step = _loss.optimizer_step
round_metrics = _scoring.round_metrics
loss_metrics = _loss.loss_metrics
run = _campaign.run
pair_batch = _pairs.pair_batch
pair_logps = _pairs.pair_logps
pair_metrics = _pairs.pair_metrics
inspect = _views.inspect
state_dict = _setup.state_dict
load_state_dict = _setup.load_state_dict
