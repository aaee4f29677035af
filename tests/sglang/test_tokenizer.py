"""The tokenizer's hop: raw inputs published by SGLang's own tokenizer manager, opened by SGLang's own schedulers."""

from pathlib import Path
from typing import Any

import pytest

from tests.sglang.engine import FROM_DICT, schedule_batch
from tests.sglang.requests import KINDS, generate, items_of, raw_of, same
from tests.sglang.tokenizer import serving
from tests.support.ranks import Ranks

pytestmark = pytest.mark.multiprocess


def at(path: Path) -> str:
    return f"ipc://{path}/s"


def stock_inputs(raw: Any) -> Any:
    """What every rank alone makes of raw inputs."""
    inputs = schedule_batch.MultimodalInputs
    return inputs.from_dict(raw) if FROM_DICT else inputs.from_processor_output(raw)


def every_kind(rank: int, address: str, flag: bool, hashed: bool) -> dict[str, Any]:
    with serving(address, flag=flag) as served:
        for name, kind in KINDS.items():
            raw = raw_of(kind())
            for item in items_of(raw) if hashed else ():
                item.set_pad_value()
            served.send(generate(name, raw))
        served.send(generate("text", None))
        served.serve(len(KINDS) + 1)
        assert served.inputs.pop("text") is None
        for name, kind in KINDS.items():
            same(served.inputs[name], stock_inputs(raw_of(kind())), name)
        stats = served.link.stats()
        assert not any(each.fallbacks for each in stats.values())
        served.forget()
        served.wait_for_leases(0)
        return {name: each.messages for name, each in stats.items()}


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_every_kind_is_what_every_rank_alone_makes(
    engines: Ranks, tmp_path: Path, n: int, flag: bool, hashed: bool
) -> None:
    first, *others = engines.run(n, every_kind, at(tmp_path), flag, hashed)
    assert all(rank["tokenizer"] == len(KINDS) for rank in [first, *others])
    assert (first["admission"], first["writer"], first["reader"]) == (0, 0, 0), "the entry rank published again"
