"""Built-in plugins, as data."""

from __future__ import annotations

GROUP = "trl_ext"
"""Group of the entry points with which packages offer plugins."""
BUILTINS: dict[str, str] = {
    "apo": "trl_ext_plugins.apo:APO",
    "constrained": "trl_ext_plugins.constrained:Constrained",
    "decs": "trl_ext_plugins.decs:DECS",
    "disco": "trl_ext_plugins.drpo:DisCO",
    "dr-mas": "trl_ext_plugins.dr_mas:DrMAS",
    "drpo": "trl_ext_plugins.drpo:DRPO",
    "dvao": "trl_ext_plugins.dvao:DVAO",
    "dynamic-weights": "trl_ext_plugins.dynamic_weights:DynamicWeights",
    "gdpo": "trl_ext_plugins.gdpo:GDPO",
    "hdpo": "trl_ext_plugins.hdpo:HDPO",
    "mix": "trl_ext_plugins.mix:Mix",
    "otc": "trl_ext_plugins.otc:OTC",
    "p3o": "trl_ext_plugins.p3o:P3O",
    "polychromic": "trl_ext_plugins.polychromic:Polychromic",
    "reg-grpo": "trl_ext_plugins.reg_grpo:RegGRPO",
    "rm-ensemble": "trl_ext_plugins.rm_ensemble:RewardModelEnsemble",
    "shared-prefix": "trl_ext_plugins.shared_prefix:SharedPrefix",
    "spae": "trl_ext_plugins.spae:SPAE",
    "tgdpo": "trl_ext_plugins.tgdpo:TGDPO",
    "thinkless": "trl_ext_plugins.thinkless:Thinkless",
    "tools": "trl_ext_plugins.tools:Tools",
    "trpa": "trl_ext_plugins.trpa:TRPA",
    "verl-rank": "trl_ext_plugins.verl_rank:VERLRank",
    "vl-dac": "trl_ext_plugins.vl_dac:VLDAC",
}
TRL = "trl"
"""What stands for TRL itself where a plugin is named. No plugin can be called so."""


def canonical(name: str) -> str:
    """Returns the one spelling of a name: `Shared_Prefix` and `shared-prefix` are the same plugin."""
    return name.lower().replace("_", "-")
