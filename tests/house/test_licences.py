"""Everything that users install has a licence that goes with ours."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts/supply_chain.py"


@pytest.fixture(scope="module")
def chain():
    spec = importlib.util.spec_from_file_location("supply_chain", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_licences_are_on_the_list(chain):
    names = chain.dependencies()
    assert {"torch", "transformers", "numpy", "jinja2"} <= set(names)
    assert not {"pytest", "pip-audit", "peft"} & set(names)  # for developers only
    wrong = {n: w for n in names if (w := chain.parts_that_are_not_allowed(chain.licence_of(n)))}
    assert not wrong


@pytest.mark.parametrize(
    ("licence", "wrong"),
    [
        ("MIT", []),
        ("Apache-2.0 AND GPL-3.0-only", ["GPL-3.0-only"]),
        ("GPL-2.0 OR BSD-3-Clause", []),
        ("GNU Affero General Public License v3", ["GNU Affero General Public License v3"]),
        ("none given", ["none given"]),
        ("Proprietary; MIT License", ["Proprietary"]),
    ],
)
def test_others_would_be_seen(chain, licence, wrong):
    assert chain.parts_that_are_not_allowed(licence) == wrong


def test_advisories_that_cannot_be_asked_are_no_success(chain, monkeypatch, capsys):
    class Silent:
        stdout, stderr = "", "ConnectionError: no route"

    monkeypatch.setattr(chain.subprocess, "run", lambda *_, **__: Silent)
    assert chain.check_advisories() == 0
    assert "NOT AUDITED" in capsys.readouterr().err
    Silent.stdout = (
        '{"dependencies": [{"name": "a", "vulns": [{"id": "X-1"}]}, {"name": "b", "vulns": []}]}'
    )
    assert chain.check_advisories() == 1
    assert "known weakness: a X-1" in capsys.readouterr().out
