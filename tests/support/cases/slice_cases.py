"""What the ranks of the slice tests do: reduce-scatter and all-gather on real gloo ranks,
compared with sums of everybody's rows."""

from typing import Any

COUNTS_R = [601, 600, 0, 599]  # uneven, and one rank without tokens


def compare_slices(hidden: int) -> dict[str, float]:
    """Largest difference on any rank, by collective and dtype; of sums relative to the largest
    value."""
    import torch
    import torch.distributed as dist

    from semmoe.runtime.layer.shuffle import around_the_ring, gather_slices, pack_slice, scatter_sums, unpack_slices
    from semmoe.runtime.ranks.group import open_group

    found: dict[str, float] = {}
    with open_group(timeout_s=60.0) as group:
        counts_R = COUNTS_R[: group.size]
        begin = sum(counts_R[: group.rank])
        own = slice(begin, begin + counts_R[group.rank])
        for dtype in (torch.float32, torch.bfloat16):
            shape = (group.size, sum(counts_R), hidden)
            partial_RTD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            expected_TD = partial_RTD.float().sum(0)
            sums_ND = scatter_sums(partial_RTD[group.rank], counts_R, group.rank, group.handle)
            chosen_TK = torch.arange(sum(counts_R) * 3, dtype=torch.int16).reshape(-1, 3)
            packed_TB = gather_slices(pack_slice(sums_ND, chosen_TK[own]), counts_R, group.handle)
            gathered_TD, gathered_TK = unpack_slices(packed_TB, hidden, 3, dtype)
            assert sums_ND.dtype == gathered_TD.dtype == dtype
            name = str(dtype).removeprefix("torch.")
            found[f"{name} ring"] = float(around_the_ring(partial_RTD[0], counts_R, group.handle))
            found[f"{name} sums"] = worst((sums_ND.float() - expected_TD[own]).abs(), expected_TD)
            found[f"{name} gathered"] = worst((gathered_TD.float() - expected_TD).abs(), expected_TD)
            found[f"{name} chosen"] = worst((gathered_TK - chosen_TK).abs().float(), torch.ones(1))
        worst_of_all = torch.tensor(list(found.values()))
        dist.all_reduce(worst_of_all, dist.ReduceOp.MAX, group=group.handle)
    return dict(zip(found, worst_of_all.tolist(), strict=True))


def worst(differences: Any, scale: Any) -> float:
    return float(differences.max() / scale.abs().max()) if differences.numel() else 0.0
