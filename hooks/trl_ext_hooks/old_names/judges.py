"""Old name of `trl_ext_hooks.toolkit.judges`."""

from trl_ext_hooks.toolkit.judges import *  # noqa: F403
