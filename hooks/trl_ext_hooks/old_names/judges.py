"""Old name of `trl_ext_hooks.toolkit.judges` and `trl_ext_hooks.toolkit.http_judge`."""

from trl_ext_hooks.toolkit.http_judge import *  # noqa: F403
from trl_ext_hooks.toolkit.judges import *  # noqa: F403
