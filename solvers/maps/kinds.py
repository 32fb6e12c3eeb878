"""The kinds of expert maps, by the name that --to and --import take."""

from semmoe.profiles.errors import InputError
from semmoe.solvers.maps import eplb, sglang, trtllm, vllm, vllm_ascend
from semmoe.solvers.maps.engine import Engine

KINDS: dict[str, Engine] = {
    "sglang": sglang.ENGINE,
    "trtllm": trtllm.ENGINE,
    "vllm": vllm.ENGINE,
    "vllm-ascend": vllm_ascend.ENGINE,
    "eplb": eplb.ENGINE,
}


def engine_of(kind: str, option: str) -> Engine:
    """The engine of a kind that `option` names. Raises InputError for an unknown one."""
    if kind not in KINDS:
        raise InputError(f"{option} is {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind]
