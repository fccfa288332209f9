"""Scores that others have published for Llama-3-8B-Instruct, to be shown beside ours and never among them."""

from collections.abc import Mapping

from sampo_ray.evaluation.tasks import CARD

SOURCE = "model card of Llama-3-8B-Instruct-Iterative-SamPO (Lu et al., EMNLP 2024, arXiv 2406.10957)"
BASES = ("Meta-Llama-3-8B-Instruct", "Llama-3-8B-Instruct")
"""Names of the model that all rows start from."""

COLUMNS = tuple(column.title for task in CARD for column in task.columns)
ROWS: Mapping[str, tuple[float, ...]] = {
    "base": (75.06, 49.40, 80.69, 63.85, 36.47, 22.57, 22.92, 421),
    "DPO": (75.59, 51.80, 81.94, 64.06, 40.39, 23.34, 23.20, 422),
    "Iterative DPO": (74.91, 52.52, 81.66, 64.02, 39.90, 23.92, 25.50, 403),
    "Iterative SamPO": (77.81, 60.55, 81.18, 64.12, 44.07, 30.68, 35.14, 377),
}
"""By method and in the order of COLUMNS: percent, and tokens of Llama 3."""


def published(model: str, method: str | None) -> Mapping[str, float]:
    """The row's values by title of the column; none for another base model or method."""
    if model not in BASES or method is None or method not in ROWS:
        return {}
    return dict(zip(COLUMNS, ROWS[method], strict=True))
