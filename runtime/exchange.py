"""The all-to-alls of expert parallelism: split sizes first, then packed rows, then results the same way back.

Every rank calls them in the same order, ranks without tokens too. `all_to_all_single` with split sizes exists on gloo and NCCL alike.

Shape letters: R ranks, M rows sent, N rows received, D values of a row.
"""

import torch
import torch.distributed as dist


def exchange_sizes(sent_RX: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What every rank announced to this one, int64 [R, X], for what this rank announces to every rank."""
    received_RX = torch.empty_like(sent_RX)
    dist.all_to_all_single(received_RX, sent_RX.contiguous(), group=group)
    return received_RX


def start_rows(
    rows_MD: torch.Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work | None]:
    """Begin to send `sent_R[r]` rows to each rank r; [N, D] is filled once the returned work has been waited for."""
    received_ND = rows_MD.new_empty((sum(received_R), *rows_MD.shape[1:]))
    work = dist.all_to_all_single(received_ND, rows_MD.contiguous(), received_R, sent_R, group=group, async_op=True)
    return received_ND, work


def wait_for(work: dist.Work | None) -> None:
    """Block until the rows have arrived (on a GPU: until the current stream may use them)."""
    if work is not None:
        work.wait()


def exchange_in_rounds(
    rows_MD: torch.Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """The same as `start_rows`, [N, D] complete on return: where slices are equal, and many senders at once would crowd a link.

    gloo sends to all peers at once, so every link gets R - 1 streams together, and queues in between overflow. In round i every rank sends
    to the rank i after it and receives from the one i before: one stream each way. NCCL arranges this by itself.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    if dist.get_backend(group) != "gloo" or rows_MD.device.type != "cpu":
        received_ND, work = start_rows(rows_MD, sent_R, received_R, group)
        wait_for(work)
        return received_ND
    received_ND = rows_MD.new_empty((sum(received_R), *rows_MD.shape[1:]))
    outgoing, incoming = rows_MD.contiguous().split(sent_R), received_ND.split(received_R)
    incoming[rank].copy_(outgoing[rank])
    for step in range(1, num_ranks):
        target, source = (rank + step) % num_ranks, (rank - step) % num_ranks
        work = []
        if received_R[source]:
            work.append(dist.irecv(incoming[source], group=group, group_src=source))
        if sent_R[target]:
            work.append(dist.isend(outgoing[target], group=group, group_dst=target))
        for transfer in work:
            wait_for(transfer)
    return received_ND
