"""The comparison as one HTML page that needs no other file."""

from importlib import resources

from jinja2 import Environment, StrictUndefined

from sampo_ray.evaluation import charts
from sampo_ray.evaluation.comparison import Comparison
from sampo_ray.evaluation.published import COLUMNS, ROWS, SOURCE
from sampo_ray.evaluation.shown import UNITS, bracketed, change, conditions, published_value, value
from sampo_ray.evaluation.style import Style


def page(found: Comparison, style: Style | None = None) -> str:
    """The page, with win rates at equal style if they are given. All texts are escaped: names of runs and models are of
    people, and notes may quote servers."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("sampo_ray.evaluation").joinpath("compare.html.jinja").read_text(encoding="utf-8")
    series = {row.name: at for at, row in enumerate(found.rows)}
    return environment.from_string(source).render(
        found=found,
        style=style,
        units=UNITS,
        series=series,
        charts=[charts.chart(figure) for figure in found.figures],
        forest=charts.forest(found.rows, found.columns),
        frame=charts,
        shown={"value": value, "bracketed": bracketed, "change": change, "published": published_value},
        conditions=conditions(found),
        published={"columns": COLUMNS, "rows": ROWS, "source": SOURCE},
    )
