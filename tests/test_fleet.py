"""What is said when a fleet does not start."""

import pytest

from sampo_ray.actors.fleet import last_words

REPORT = """Deploying application r1-policy failed: Failed to update the deployments ['policy'].
The deployment failed to start 3 times in a row due to an internal error. Error:
ray::ServeReplica:r1-policy:policy.initialize_and_get_metadata() (pid=7)
  File "engine.py", line 222, in start
    raise RuntimeError(f"Failed to create the config: {e}") from None
RuntimeError: Failed to create the config: 1 validation error for ModelConfig
  Value error, Unknown quantization method: nonsense. [type=value_error]
    For further information visit https://errors.example
"""


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            REPORT,
            "RuntimeError: Failed to create the config: 1 validation error for ModelConfig Value error, "
            "Unknown quantization method: nonsense. [type=value_error]",
        ),
        ("torch.OutOfMemoryError: no room", "torch.OutOfMemoryError: no room"),
        ("Deploying failed", "Deploying failed"),
        ("", "an application could not be started"),
    ],
)
def test_the_last_words_of_a_replica_are_its_error(report: str, words: str) -> None:
    assert last_words(report) == words


def test_last_words_are_not_endless() -> None:
    assert len(last_words(f"ValueError: {'too much ' * 1000}")) <= 500
