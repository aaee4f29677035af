"""The data parallel replicas behind one tokenizer: which of its readers are whose, and who chooses one for a request.

SGLang's data parallel controller, a process behind the tokenizer, sends a request to the replica that it names, and
chooses for all others. Where it would take turns, the tokenizer takes them instead, and requests name their replica.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replicas:
    """Of a server: how many, and how many ranks each has. The readers of one follow those of the one before it.

    `choosing`: why only the controller can choose a request's replica, or nothing.
    """

    count: int
    ranks: int
    choosing: str = ""

    def readers(self, replica: int) -> range:
        """The ranks of one replica, as readers; of none where there is no such replica."""
        return range(replica * self.ranks, (replica + 1) * self.ranks) if replica in range(self.count) else range(0)


def resolved(args: Any) -> Any:
    """Resolved server arguments as SGLang reads them: from 0.5.19 on what it decided lies beside them."""
    if not hasattr(args, "resolve_once"):
        return args
    return importlib.import_module("sglang.srt.arg_groups.overrides").resolved_view(args)


def replicas_of(args: Any) -> Replicas:
    """The replicas of a server with these resolved arguments.

    Under data-parallel attention they are parts of one world; from 0.5.22 on `attn_dp_size` of them.
    """
    worlds = getattr(args, "dp_size", 1)
    parts = getattr(args, "attn_dp_size", 1)
    if getattr(args, "enable_dp_attention", False):
        worlds, parts = 1, worlds
    ranks = args.tp_size * getattr(args, "pp_size", 1) // parts
    return Replicas(worlds * parts, ranks, _choosing(args))


def _choosing(args: Any) -> str:
    method = getattr(args, "load_balance_method", "round_robin")
    if method != "round_robin":
        return f"load_balance_method={method}"
    mode = getattr(args, "disaggregation_mode", "null")
    return "" if mode == "null" else f"disaggregation_mode={mode}"
