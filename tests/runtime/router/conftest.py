import pytest
from engine_plans import served_plan


@pytest.fixture(scope="session")
def plan(tmp_path_factory) -> str:
    """A plan for two ranks with a request scorer."""
    folder = tmp_path_factory.mktemp("routed")
    served_plan(folder, ranks=2).save(folder / "p")
    return str(folder / "p")
