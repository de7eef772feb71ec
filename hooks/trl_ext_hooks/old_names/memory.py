"""Old name of `trl_ext_hooks.toolkit.prompt_memory`."""

from trl_ext_hooks.toolkit.prompt_memory import *  # noqa: F403
