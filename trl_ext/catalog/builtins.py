"""Built-in plugins, as data."""

from __future__ import annotations

GROUP = "trl_ext"
"""Group of the entry points with which packages offer plugins."""
BUILTINS: dict[str, str] = {
    "apo": "trl_ext_plugins.apo:APO",
    "decs": "trl_ext_plugins.decs:DECS",
    "dr-mas": "trl_ext_plugins.dr_mas:DrMAS",
    "dvao": "trl_ext_plugins.dvao:DVAO",
    "gdpo": "trl_ext_plugins.gdpo:GDPO",
    "hdpo": "trl_ext_plugins.hdpo:HDPO",
    "mix": "trl_ext_plugins.mix:Mix",
    "otc": "trl_ext_plugins.otc:OTC",
    "p3o": "trl_ext_plugins.p3o:P3O",
    "polychromic": "trl_ext_plugins.polychromic:Polychromic",
    "shared-prefix": "trl_ext_plugins.shared_prefix:SharedPrefix",
    "spae": "trl_ext_plugins.spae:SPAE",
    "tgdpo": "trl_ext_plugins.tgdpo:TGDPO",
    "thinkless": "trl_ext_plugins.thinkless:Thinkless",
    "tools": "trl_ext_plugins.tools:Tools",
    "trpa": "trl_ext_plugins.trpa:TRPA",
    "vl-dac": "trl_ext_plugins.vl_dac:VLDAC",
}
TRL = "trl"
"""What stands for TRL itself where a plugin is named. No plugin can be called so."""


def canonical(name: str) -> str:
    """Returns the one spelling of a name: `Shared_Prefix` and `shared-prefix` are the same plugin."""
    return name.lower().replace("_", "-")
