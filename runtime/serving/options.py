"""What the user asks of a run. PyTorch is not needed to say it."""

from dataclasses import dataclass

from semmoe.profiles.capture.requests import RequestSource


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user asked for."""

    checkpoint: str
    plan: str
    prompts: RequestSource
    scheduler: str | None = None  # None: dp where the plan scores requests, else none
    predict: str = "context"
    replica_choice: str | None = None  # None: the plan's
    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_new_tokens: int = 32
    batch_tokens: int = 4096
    output: str | None = None
    timeout_s: float = 300.0
    check: bool = False
    reference: str | None = None  # what check compares with; None: the checkpoint itself
    replan: str | None = None  # a plan to go on with
    after: int = 0  # steps before it
    verify: bool = True  # compare a reshard with the checksums of its semmoe.json
