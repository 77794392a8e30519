"""Every Python snippet in the documentation runs."""

import doctest
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import bn_callbacks
from bn_callbacks.statistics import causes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# They train a model for each cause or recipe: more than a few seconds.
SLOW = {"causes.md", "command-line.md", "distribution.md", "recipes.md"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(document: Path) -> list[tuple[int, str]]:
    """Line above the code, and the code, of each snippet."""
    text = document.read_text("utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match.group(1))
        for match in SNIPPET.finditer(text)
    ]


def run(document: Path, namespace: dict) -> None:
    """Runs the snippets of a document one after the other in one namespace."""
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for line, code in snippets(document):
        if code.startswith(">>>"):
            parse = doctest.DocTestParser().get_doctest
            test = parse(code, namespace, document.name, str(document), line)
            report: list[str] = []
            failures = runner.run(test, out=report.append, clear_globs=False).failed
            assert not failures, "".join(report)
            namespace.update(test.globs)
        else:
            exec(compile("\n" * line + code, str(document), "exec"), namespace)


def prelude() -> dict:
    """What a reader of the README has: data and a compiled model."""
    x = np.random.default_rng(0).normal(3, 2, (640, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile("adam", "mse")
    return {
        "model": model,
        "x_train": x[:512],
        "y_train": y[:512],
        "x_val": x[512:],
        "y_val": y[512:],
    }


@pytest.mark.filterwarnings("ignore::bn_callbacks.BatchNormWarning")
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            path,
            id=path.name,
            marks=[pytest.mark.slow] if path.name in SLOW else [],
        )
        for path in DOCUMENTS
        if snippets(path)
    ],
)
def test_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(document, prelude() if document.name == "README.md" else {})


def test_every_public_name_has_a_page_of_its_own():
    overview = (ROOT / "docs/api.md").read_text("utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    names = {page.stem for page in pages if not page.stem.startswith("statistics.")}
    assert names == set(bn_callbacks.__all__)
    for page in pages:
        assert f"(api/{page.name})" in overview
        assert f": api/{page.name}\n" in navigation
        assert f"::: bn_callbacks.{page.stem}" in page.read_text("utf-8")


def test_every_cause_has_a_section_with_an_example():
    page = (ROOT / "docs/causes.md").read_text("utf-8")
    sections = dict(re.findall(r"^## `(\w+)`: (.*?)(?=^## )", page, re.S | re.M))
    words = {value for name, value in vars(causes).items() if name.isupper()}
    assert words - {causes.HEALTHY} <= set(sections)
    for word in words - {causes.HEALTHY}:
        assert "- **Symptom**" in sections[word]
        assert "- **Remedy**" in sections[word]
        # In an audit the report says it, in `fit` a message.
        said = rf"Likely\s+cause:\s+{word}\.|^\(?'{word}'"
        assert re.search(said, sections[word], re.MULTILINE), word


def test_readme_and_guide_have_snippets():
    with_snippets = {path.name for path in DOCUMENTS if snippets(path)}
    assert with_snippets >= {"README.md", "guide.md"}


@pytest.mark.parametrize("code", [">>> 1 + 1\n3\n", ">>> 1 / 0\n", "raise KeyError\n"])
def test_a_broken_snippet_is_found(code, tmp_path):
    document = tmp_path / "broken.md"
    document.write_text(f"# Title\n\n```python\n{code}```\n", "utf-8")
    with pytest.raises((AssertionError, KeyError)):
        run(document, {})


def test_an_error_in_a_snippet_names_its_line(tmp_path):
    document = tmp_path / "broken.md"
    document.write_text("# Title\n\n```python\nx = 1\n1 / 0\n```\n", "utf-8")
    with pytest.raises(ZeroDivisionError) as error:
        run(document, {})
    assert error.traceback[-1].lineno + 1 == 5
