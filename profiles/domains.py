"""Domains of requests as a short list: what a table or a picture can show.

Shape letter: B requests.
"""

from collections import Counter

import numpy as np

OTHER = "other"


def domain_groups(domains_B: list[str], *, most: int = 12) -> tuple[list[str], np.ndarray]:
    """At most `most` names, ascending, and each request's index among them, int64 [B].

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
