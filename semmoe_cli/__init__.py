"""Expert placement for Mixture-of-Experts models, as a library: docs/api.md shows every name.

    import semmoe

    plan = semmoe.place(semmoe.open_trace("t"), ranks=8)
    plan.save("p")

What cannot be used raises `semmoe.InputError` with one line. A name is imported when it is first
asked for, and torch never, unless a .pt file is read or written.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semmoe.api import (
        Comparison,
        Demands,
        ImportOptions,
        InputError,
        MapOptions,
        Placement,
        Plan,
        PlanOptions,
        Report,
        RequestScorer,
        RoutingTrace,
        Setting,
        Topology,
        compare,
        export,
        import_trace,
        open_trace,
        place,
        read_plan,
        read_topology,
        request_scorer,
        score,
    )

    __version__: str

__all__ = [
    "Comparison",
    "Demands",
    "ImportOptions",
    "InputError",
    "MapOptions",
    "Placement",
    "Plan",
    "PlanOptions",
    "Report",
    "RequestScorer",
    "RoutingTrace",
    "Setting",
    "Topology",
    "__version__",
    "compare",
    "export",
    "import_trace",
    "open_trace",
    "place",
    "read_plan",
    "read_topology",
    "request_scorer",
    "score",
]


def __getattr__(name: str) -> Any:
    """The value of a name that is asked for first (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("semmoe")
    elif name in __all__:
        from semmoe import api

        value = getattr(api, name)
    else:
        raise AttributeError(f"module 'semmoe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
