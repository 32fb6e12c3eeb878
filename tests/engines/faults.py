"""A plug-in of vLLM for tests/engines/all: it breaks semmoe's for requests that ask for it, in the
two places that every request passes. `live.py plugin FOLDER` puts it where vLLM finds it."""

BROKEN_IDS = [11, 12, 13]  # prompts that begin so cannot be scored
BROKEN_NAME = "broken-note"  # requests of that name cannot be counted where they went


def register() -> None:
    from semmoe.runtime.engines.chooser import RankChooser
    from semmoe.runtime.engines.scorer import PlanScorer

    scores, add = PlanScorer.scores, RankChooser.add

    def broken_scores(self, ids):
        if list(ids[: len(BROKEN_IDS)]) == BROKEN_IDS:
            raise ZeroDivisionError("a fault that a test put into the score")
        return scores(self, ids)

    def broken_add(self, name, place, tokens):
        if BROKEN_NAME in name:
            raise ZeroDivisionError("a fault that a test put into the count")
        add(self, name, place, tokens)

    PlanScorer.scores, RankChooser.add = broken_scores, broken_add
