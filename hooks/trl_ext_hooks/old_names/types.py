"""Old name of the types, which now stand beside the hooks that use them."""

from trl_ext_hooks.basics import *  # noqa: F403
from trl_ext_hooks.campaign import *  # noqa: F403
from trl_ext_hooks.loss import *  # noqa: F403
from trl_ext_hooks.pairs import *  # noqa: F403
from trl_ext_hooks.rollout import *  # noqa: F403
from trl_ext_hooks.scoring import *  # noqa: F403
from trl_ext_hooks.setup import *  # noqa: F403
from trl_ext_hooks.trainer import *  # noqa: F403
from trl_ext_hooks.views import *  # noqa: F403
