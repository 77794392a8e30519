"""Each example runs as a reader would run it, and prints what the pages say it does."""

import os
import re
import runpy
import subprocess
import sys
import wave
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from extras import needed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs/examples"
PICTURES = ROOT / "docs/pictures"
PAGE = (ROOT / "docs/examples.md").read_text("utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")


def run(script, *arguments, directory):
    """What a script prints. Two minutes are the promise; a busy machine gets more."""
    result = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


def on_page(mark, until=r"\n\n"):
    """The part of the page after a mark, which holds figures of an example."""
    (text,) = re.findall(rf"<!-- {re.escape(mark)} -->(.*?){until}", PAGE, re.DOTALL)
    return text


def after(text, label):
    """The numbers in the rest of the line after a label."""
    (line,) = re.findall(rf"^.*{re.escape(label)}(.*)$", text, re.MULTILINE)
    return numbers(line)


def test_page_and_folder_have_the_same_examples():
    linked = set(re.findall(r"^\| \[`(\w+\.py)`\]", PAGE, re.MULTILINE))
    assert linked == {path.name for path in EXAMPLES.glob("*.py")}


def test_every_picture_of_the_guide_exists_and_has_a_script():
    guide = (ROOT / "docs/guide.md").read_text("utf-8")
    shown = set(re.findall(r"\]\(pictures/(\w+)\.svg\)", guide))
    assert shown == {path.stem for path in PICTURES.glob("*.svg")}


def test_every_picture_of_the_readme_exists():
    readme = (ROOT / "README.md").read_text("utf-8")
    pictures = re.findall(r"^!\[[^]]+\]\(([^)]+)\)", readme, re.MULTILINE)
    assert pictures
    assert [path for path in pictures if not (ROOT / path).is_file()] == []


def test_arithmetic_shows_what_the_comparison_says(capsys):
    runpy.run_path(str(EXAMPLES / "arithmetic.py"))
    printed = capsys.readouterr().out
    rows = {line[:46].strip(): line[46:] for line in printed.splitlines()}
    figures = {
        name: [float(value) for value in re.findall(r"-?[\d.]+", rest)]
        for name, rest in rows.items()
    }
    pooled = [pair for name, pair in figures.items() if name.endswith("pooled")]
    assert len(pooled) == 4
    assert all(value == truth for value, truth in pooled)
    comparison = (ROOT / "docs/comparison.md").read_text("utf-8")
    quoted = re.findall(r"^\| (.+?) \| (-?[\d.]+) \| (-?[\d.]+) \|$", comparison, re.M)
    assert len(quoted) >= 6
    for name, value, truth in quoted:
        assert figures[name] == [float(value), float(truth)], name


@pytest.mark.slow
def test_digits(tmp_path):
    printed = run(EXAMPLES / "digits.py", directory=tmp_path)
    assert "Likely cause: warming_up" in printed
    assert list((tmp_path / "logs/digits").rglob("events.out.tfevents.*"))
    trained, repaired, loaded = (
        after(printed, name)
        for name in ("as trained", "recalibrated  ", "loaded again")
    )
    assert loaded == repaired
    assert [trained[0], repaired[0]] == pytest.approx(
        numbers(on_page("digits.py")), rel=0.1
    )
    assert after(printed, "loss gap: ")[0] < 1.4


@pytest.mark.slow
def test_transfer(tmp_path):
    printed = run(EXAMPLES / "transfer.py", directory=tmp_path)
    overridden, frozen = printed.split("trainable=False, then compile")
    assert "statistics changed" in overridden
    assert overridden.count(": unexpected_update") >= 2
    assert "statistics as before" in frozen
    assert "warning" not in frozen
    accuracy = [after(part, "accuracy ")[0] for part in (overridden, frozen)]
    assert accuracy == pytest.approx(numbers(on_page("transfer.py")), abs=5)
    assert accuracy[1] > accuracy[0] + 10


@pytest.mark.slow
def test_ema(tmp_path):
    printed = run(EXAMPLES / "ema.py", directory=tmp_path)
    last, averaged, recalibrated = (
        after(printed, f"{name}: validation loss ")
        for name in (
            "weights of the last step",
            "averaged weights",
            "averaged weights, recalibrated",
        )
    )
    assert recalibrated[0] < last[0] < averaged[0]
    assert printed.count("Likely cause: weights_replaced") == 1
    accuracy = [row[1] for row in (last, averaged, recalibrated)]
    assert accuracy == pytest.approx(numbers(on_page("ema.py")), abs=3)


@pytest.mark.slow
def test_averaged_weights(tmp_path):
    printed = run(EXAMPLES / "averaged_weights.py", directory=tmp_path)
    page = (ROOT / "docs/averaged-weights.md").read_text("utf-8")
    gains = []
    for label in ("| optimizer EMA |", "| SWA of 6 epochs |", "| soup of 4 |"):
        (_, _, before, _, loss, right, of_4, _, of_64), shown = (
            after(text, label) for text in (printed, page)
        )
        # Runs differ: an average of epochs that are alike may have little to repair.
        assert loss < 1.25 * before
        gains.append(before - loss)
        assert of_64 < min(10, of_4 + 1)
        assert right == pytest.approx(shown[5], abs=1)
    assert sum(gain > 0 for gain in gains) >= 2
    for share in ("0.00", "0.50", "1.00"):
        row, shown = (after(text, f"| {share} |") for text in (printed, page))
        assert row[3] == pytest.approx(shown[3], abs=2)
    barriers, shown = after(printed, "barrier: "), after(page, "The barrier is ")
    assert barriers[1] < barriers[0] / 5
    assert barriers[0] == pytest.approx(shown[0], rel=0.6)
    assert "21 points: 21 passes, 0 new traces" in printed


@pytest.mark.slow
def test_custom_loop(tmp_path):
    printed = run(EXAMPLES / "custom_loop.py", directory=tmp_path)
    epochs = [
        numbers(line) for line in printed.splitlines() if line.startswith("loss ")
    ]
    assert len(epochs) == 3
    assert all(repaired < plain for _, plain, repaired in epochs)
    assert "Likely cause: warming_up" in printed
    final = re.findall(r"^validation loss (\d\.\d+), loss gap", printed, re.MULTILINE)
    assert float(final[0]) == pytest.approx(epochs[-1][2], rel=0.01)


@pytest.mark.slow
def test_federated(tmp_path):
    printed = run(EXAMPLES / "federated.py", directory=tmp_path)
    averaged, merged, together = (
        after(printed, name)
        for name in ("averaged statistics: ", "merged moments ", "all in one place ")
    )
    assert merged == pytest.approx(together, rel=0.02)
    assert merged[1] < averaged[1] / 2
    figures = numbers(on_page("federated.py"))
    assert [*averaged[:2], *merged[:2]] == pytest.approx(figures, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_beam(mode, tmp_path):
    needed("apache_beam", "hosts")
    options = "--direct_running_mode", mode
    printed = run(EXAMPLES / "beam.py", *options, directory=tmp_path)
    trained, rounds, together = (
        after(printed, f"{name}: validation loss ")
        for name in ("as trained      ", "two rounds      ", "all in one place")
    )
    assert rounds == pytest.approx(together, rel=0.01)
    (off,) = re.findall(r"^variances differ by (.*) at most$", printed, re.MULTILINE)
    assert float(off) < 1e-3
    assert "1280 pictures. The last round has moved the statistics by" in printed
    figures = numbers(on_page("beam.py"))
    assert [*trained, *rounds] == pytest.approx(figures, rel=0.1)


@pytest.mark.slow
def test_multi_worker(tmp_path):
    printed = run(EXAMPLES / "multi_worker.py", directory=tmp_path)
    assert "worker 0: 1 of 1 BatchNormalization layers lag" in printed
    assert "Likely cause: replicas_differ" in printed
    told = re.findall(r"^worker (\d): recalibrated over 1280 (.*)$", printed, re.M)
    assert sorted(worker for worker, _ in told) == ["0", "1"]
    assert len({statistics for _, statistics in told}) == 1
    accuracy = [
        *after(printed, "as trained: "),
        *after(printed, "saved and loaded again: "),
    ]
    assert accuracy == pytest.approx(numbers(on_page("multi_worker.py", r"\Z")), abs=5)
    assert accuracy[3] > accuracy[1] + 50


@pytest.mark.slow
def test_dropout(tmp_path):
    printed = run(EXAMPLES / "dropout.py", directory=tmp_path)
    models = (ROOT / "docs/models.md").read_text("utf-8")
    table = models.split("<!-- dropout.py -->")[1].split("\n\n")[0]
    for model, better, worse in (("regression", 2, 1), ("digits", 1, 2)):
        losses = after(printed, f"{model} ")
        assert losses == pytest.approx(after(table, f"| {model} |"), rel=0.25)
        assert losses[better] < losses[0]
        assert losses[worse] > 1.3 * losses[better]


@pytest.mark.slow
def test_speech(tmp_path):
    speech = runpy.run_path(str(EXAMPLES / "speech.py"))
    if not any(speech["RECORDINGS"].glob("*.wav")):
        message = f"Install the recordings: apt-get install {speech['PACKAGE']}"
        # .ci/run installs them, and must not pass without.
        (pytest.fail if os.environ.get("BN_CALLBACKS_CI") else pytest.skip)(message)
    printed = run(EXAMPLES / "speech.py", directory=tmp_path)
    advice = printed.split("The advice, and what came of it")[1]
    usual, lower, without, recalibrated, shuffled = (
        after(advice, label)[0]
        for label in (
            "one utterance a batch  ",
            '"a smaller momentum"',
            '"no BatchNormalization"',
            "statistics recalibrated",
            "so that a batch is a sample",
        )
    )
    # What the page says in words.
    assert min(usual, lower) > 1.3 * max(without, recalibrated)
    assert shuffled < min(without, recalibrated)
    runs = printed.split("\nOne utterance a batch, momentum 0.99, validation loss")[0]
    verdicts = re.findall(r"bn_1: (\w+)", runs)
    assert verdicts == ["correlated_batches"] * 3 + ["healthy"]
    # What the page says in figures.
    rows = on_page("speech.py runs").splitlines()[3:]
    table = [numbers(row.split("|")[4]) for row in rows]
    final = [numbers(line)[-1] for line in re.findall(r"^  loss(.*)", runs, re.M)]
    assert final == pytest.approx([numbers(row.split("|")[3])[0] for row in rows], 0.1)
    losses = [numbers(line) for line in re.findall(r"val_loss(.*)", runs)]
    assert len(losses) == len(table) == 5
    for printed_row, page_row in zip(losses, table, strict=True):
        assert printed_row == pytest.approx(page_row, rel=0.4)
    cures = printed.split("momentum 0.99, validation loss\n")[1].split("\n\n")[0]
    figures = numbers(cures)
    assert figures == pytest.approx(numbers(on_page("speech.py cures")), rel=0.2)
    trained, debiased, one_pass, refined, one_shuffled, refined_shuffled = figures
    assert debiased == trained
    assert refined == pytest.approx(refined_shuffled, rel=0.01)
    assert one_pass != pytest.approx(refined, rel=0.01)
    assert refined == pytest.approx(one_shuffled, rel=0.05)


@pytest.mark.parametrize("content", ["nothing", "text.wav", "short.wav"])
def test_speech_says_what_it_needs(content, tmp_path):
    if content == "text.wav":
        (tmp_path / content).write_text("no sound")
    elif content == "short.wav":
        with wave.open(str(tmp_path / content), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(100))
    speech = runpy.run_path(str(EXAMPLES / "speech.py"))
    with pytest.raises(SystemExit, match="At least 10 WAV files of 16 bit PCM") as end:
        speech["read"](tmp_path, 10)
    assert str(tmp_path) in str(end.value)
    assert speech["PACKAGE"] in str(end.value)


@pytest.mark.slow
def test_pictures_are_what_their_script_makes(tmp_path):
    pytest.importorskip("matplotlib")
    run(PICTURES / "make.py", tmp_path, directory=tmp_path)
    made = {path.name: words(path) for path in tmp_path.glob("*.svg")}
    assert made == {path.name: words(path) for path in PICTURES.glob("*.svg")}


def words(picture):
    """The text of a picture, and how many lines are drawn in it."""
    root = ElementTree.parse(picture).getroot()
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    lines = [e for e in root.iter() if e.get("id", "").startswith("line2d")]
    return texts, len(lines)
