"""Old name of `trl_ext_hooks.toolkit.segments`."""

from trl_ext_hooks.toolkit.segments import *  # noqa: F403
