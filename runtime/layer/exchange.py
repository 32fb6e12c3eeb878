"""The all-to-alls of expert parallelism: split sizes first, then packed rows, then results the same
way back.

Every rank calls them in the same order, ranks without tokens too. NCCL, and gloo with tensors on a
GPU, use `all_to_all_single` with split sizes. gloo on CPUs gets one send and one receive per pair
of ranks: its own all-to-all takes 1.2 to 1.5 times as long on slow links (docs/experiments.md), and
its reduce-scatter is an all-reduce that throws most away.

Shape letters: R ranks, M rows sent, N rows received, D values of a row.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def exchange_sizes(sent_RX: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What every rank announced to this one, int64 [R, X], for what this rank announces to every
    rank."""
    received_RX = torch.empty_like(sent_RX)
    dist.all_to_all_single(received_RX, sent_RX.contiguous(), group=group)
    return received_RX


def start_rows(
    rows_MD: torch.Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, list[dist.Work]]:
    """Begin to send `sent_R[r]` rows to each rank r; [N, D] is filled once the returned work has
    been waited for."""
    rows_MD = rows_MD.contiguous()
    if in_pairs(rows_MD, group):
        return start_parts(rows_MD.split(sent_R), received_R, group)
    received_ND = rows_MD.new_empty((sum(received_R), *rows_MD.shape[1:]))
    work = dist.all_to_all_single(received_ND, rows_MD, received_R, sent_R, group=group, async_op=True)
    return received_ND, [] if work is None else [work]


def start_parts(
    part_R: Sequence[torch.Tensor], received_R: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, list[dist.Work]]:
    """Begin to send part r, rows [M, D], to each rank r. Parts may be the same memory; keep them
    until the work is done."""
    if not in_pairs(part_R[0], group):
        return start_rows(torch.cat(list(part_R)), [len(part) for part in part_R], received_R, group)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    received_ND = part_R[0].new_empty((sum(received_R), *part_R[0].shape[1:]))
    incoming = received_ND.split(received_R)
    incoming[rank].copy_(part_R[rank])
    steps = range(1, num_ranks)
    work = [_receive(incoming[(rank - step) % num_ranks], (rank - step) % num_ranks, group) for step in steps]
    work += [_send(part_R[(rank + step) % num_ranks], (rank + step) % num_ranks, group) for step in steps]
    return received_ND, [transfer for transfer in work if transfer is not None]


def wait_for(work: list[dist.Work]) -> None:
    """Block until the rows have arrived (on a GPU: until the current stream may use them)."""
    for transfer in work:
        transfer.wait()


def ring_sum(part_R: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over all ranks of part `rank`, [N, D]: a reduce-scatter around the ring. gloo on CPUs
    only.

    Every rank sends to the next and receives from the one before, R - 1 times: one stream per link
    and direction, where all at once would give every link R - 1, and queues in between overflow.
    Sums are rounded to the rows' dtype at each step, as NCCL's are.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    sum_ND = part_R[(rank - 1) % num_ranks]
    for step in range(2, num_ranks + 1):
        part_ND = part_R[(rank - step) % num_ranks]
        incoming_ND = torch.empty_like(part_ND)
        _pass_on(sum_ND, incoming_ND, group)
        sum_ND = incoming_ND.add_(part_ND)
    return sum_ND


def ring_gather(rows_NB: torch.Tensor, counts_R: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks, [T, B] in order of rank: an all-gather around the ring. gloo on
    CPUs only."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    gathered_TB = rows_NB.new_empty((sum(counts_R), *rows_NB.shape[1:]))
    part_R = gathered_TB.split(counts_R)
    part_R[rank].copy_(rows_NB)
    for step in range(num_ranks - 1):
        _pass_on(part_R[(rank - step) % num_ranks], part_R[(rank - step - 1) % num_ranks], group)
    return gathered_TB


def in_pairs(rows: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether rows travel between pairs of ranks: gloo on CPUs, which cannot send from a GPU."""
    return rows.device.type == "cpu" and dist.get_backend(group) == "gloo"


def _pass_on(outgoing: torch.Tensor, incoming: torch.Tensor, group: dist.ProcessGroup) -> None:
    """To the next rank, and from the one before."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    transfers = [_receive(incoming, (rank - 1) % num_ranks, group), _send(outgoing, (rank + 1) % num_ranks, group)]
    wait_for([transfer for transfer in transfers if transfer is not None])


def _receive(rows: torch.Tensor, source: int, group: dist.ProcessGroup) -> dist.Work | None:
    return dist.irecv(rows, group=group, group_src=source) if len(rows) else None


def _send(rows: torch.Tensor, target: int, group: dist.ProcessGroup) -> dist.Work | None:
    return dist.isend(rows, group=group, group_dst=target) if len(rows) else None
