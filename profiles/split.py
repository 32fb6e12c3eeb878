"""Which requests are held out. A split is by request, never by token: tokens of one request are not
independent.

Shape letter: B requests.
"""

import hashlib

import numpy as np
import pyarrow as pa

from semmoe.profiles.errors import InputError


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
