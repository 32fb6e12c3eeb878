"""How the requests of a trace are divided: held out or not, and by domain.

A split is by request, never by token: tokens of one request are not independent.

Shape letter: B requests.
"""

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa

from semmoe.profiles.errors import InputError

OTHER = "other"  # the domain of the rare ones


def holdout_requests(requests: pa.Table, *, holdout: float, holdout_domains: list[str], seed: int) -> np.ndarray:
    """Requests to score on and not to learn from, bool [B].

    A share `holdout` of the requests, drawn at random; with `holdout_domains`, all requests of
    those domains instead. Raises InputError where a domain is unknown or one side would be empty.
    """
    num_requests = requests.num_rows
    if holdout_domains:
        domains = np.array(requests.column("domain").to_pylist(), dtype=object)
        for domain in holdout_domains:
            if domain not in domains:
                known = ", ".join(sorted(set(domains))[:12])
                raise InputError(f"no request has the domain {domain!r}; domains are: {known}")
        held_out_B = np.isin(domains, holdout_domains)
    else:
        if not 0 < holdout < 1:
            raise InputError(f"--holdout is {holdout}, expected a share between 0 and 1")
        held_out_B = np.zeros(num_requests, bool)
        chosen = np.random.default_rng(seed).permutation(num_requests)[: max(1, round(holdout * num_requests))]
        held_out_B[chosen] = True
    if held_out_B.all() or not held_out_B.any():
        raise InputError(
            f"{num_requests} request{'s' * (num_requests != 1)} cannot be split: {int(held_out_B.sum())} held out, "
            "the rest to learn from"
        )
    return held_out_B


def request_keys(requests: pa.Table) -> np.ndarray:
    """A key for each request, uint64 [B], equal for the same request in any trace: what a plan
    keeps of the requests it was fitted on.

    `requests`: the table of RoutingTrace.requests().
    """
    columns = ("request_id", "domain", "num_prompt_tokens", "num_tokens")
    rows = zip(*(requests.column(name).to_pylist() for name in columns), strict=True)
    digests = b"".join(hashlib.blake2b("\0".join(map(str, row)).encode(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8")


def domain_groups(domains_B: list[str], *, most: int = 12) -> tuple[list[str], np.ndarray]:
    """Domains as a short list, which a table or a picture can show: at most `most` names,
    ascending, and each request's index among them, int64 [B].

    Where there are more domains, they are taken by what stands before the first "/" (data
    set/subject), and beyond that the rare ones become "other".
    """
    names_B = [name or "(none)" for name in domains_B]
    if len(set(names_B)) > most:
        names_B = [name.split("/")[0] for name in names_B]
    counts = Counter(names_B)
    if len(counts) > most:
        kept = {name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: most - 1]}
        names_B = [name if name in kept else OTHER for name in names_B]
    names = sorted(set(names_B))
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[name] for name in names_B], np.int64)
