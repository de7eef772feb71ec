"""Old name of `trl_ext_hooks.toolkit.tool_calls`."""

from trl_ext_hooks.toolkit.tool_calls import *  # noqa: F403
