"""``docs/options.md`` names every option, and its Python runs."""

import inspect
import re
from pathlib import Path

import pytest

from vae_fast import FusedELBO, elbo, functional, ops, schedules

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "options.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    "name",
    [
        *arguments(FusedELBO),
        *arguments(FusedELBO.forward),
        *schedules.__all__,
        "bits_per_dim",
        "VAE.log_likelihood",
    ],
)
def test_every_argument_is_documented(name):
    assert re.search(rf"`{re.escape(name)}[`(]", TEXT)


@pytest.mark.parametrize(
    "value",
    [
        *elbo.LIKELIHOODS,
        *elbo.ESTIMATORS,
        *elbo.OBJECTIVES,
        *elbo.KL_ESTIMATORS,
        *elbo.OPTIMAL,
        *ops.PARAMS,
        *ops.REDUCTIONS,
        *functional._CLAMP_MODES,
    ],
)
def test_every_value_is_documented(value):
    assert f'`"{value}"`' in TEXT


def test_tables_have_as_many_cells_in_every_row():
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.M):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(cells) == 1, table


def test_there_are_snippets():
    assert len(SNIPPETS) == 9


@pytest.mark.parametrize("index", range(9))
def test_snippet_runs(index):
    exec(compile(SNIPPETS[index], f"options.md[{index}]", "exec"), {})
