"""What is installed, and what is said where TensorFlow is missing."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bn_callbacks
from bn_callbacks.installing import NotInstalledError, import_with_advice

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HIDDEN = "import sys; sys.modules['tensorflow'] = None\n"
"""Python takes a module that is None for one that is not there."""
INSTALL = 'python -m pip install "bn-callbacks[tensorflow]"'
RUN_DEMO = "from bn_callbacks import cli; sys.exit(cli.main(['demo', *sys.argv[1:]]))"


def python(code, *arguments, program=sys.executable, backend=None, cwd=None):
    """Runs code in a process of its own, in which Keras is set to a backend."""
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    return subprocess.run(
        [program, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize(
    "use",
    ["import bn_callbacks as b; b.audit", "from bn_callbacks import BatchNormMonitor"],
)
def test_the_first_use_without_tensorflow_says_what_to_install(use):
    done = python(HIDDEN + use)
    *_, said = done.stderr.strip().splitlines()
    assert said == (
        f"bn_callbacks.installing.NotInstalledError: TensorFlow is not installed: run "
        f"{INSTALL}, or install the package of your choice, such as tensorflow-cpu."
    )


def test_each_use_without_tensorflow_says_it_again():
    done = python(
        f"{HIDDEN}import bn_callbacks\n"
        "for name in ('audit', 'audit', 'BatchNormMonitor'):\n"
        "    try:\n"
        "        getattr(bn_callbacks, name)\n"
        "    except ImportError as error:\n"
        "        print(error.name, str(error)[:28])\n"
    )
    assert done.stdout.splitlines() == ["tensorflow TensorFlow is not installed:"] * 3


def test_what_needs_no_tensorflow_works_without_it():
    code = f"{HIDDEN}import bn_callbacks as b; print(b.suggest_momentum(100))"
    done = python(f"{code}; b.BatchNormReport, b.BatchNormLagWarning")
    assert (done.stdout, done.stderr) == ("0.9\n", "")


def test_another_backend_that_is_not_installed_is_named():
    code = "sys.modules['torch'] = None; import bn_callbacks; bn_callbacks.audit"
    *_, said = python(f"import sys; {code}", backend="torch").stderr.splitlines()
    assert said.endswith(
        "bn_callbacks works on Keras' TensorFlow backend only: set the environment "
        "variable KERAS_BACKEND=tensorflow. Received: KERAS_BACKEND=torch."
    )
    assert "not installed" not in said


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_command_without_tensorflow_says_it_in_one_line(options, tmp_path):
    done = python(f"{HIDDEN}{RUN_DEMO}", *options, backend="torch", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *traceback, said = done.stderr.splitlines()
    assert said.startswith(f"bn-callbacks: TensorFlow is not installed: run {INSTALL},")
    assert said.endswith("Received: KERAS_BACKEND=torch.")
    assert bool(traceback) == bool(options)


def test_a_module_of_somebody_else_that_is_missing_is_not_explained():
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'") as error:
        import_with_advice("nowhere.at_all")
    assert not isinstance(error.value, NotInstalledError)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments, program=sys.executable):
    command = [program, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def resolved(folder, *wanted):
    """Names of the packages that pip would install where there is none yet."""
    report = folder / "report.json"
    pip("install", "--dry-run", "--ignore-installed", "--report", report, *wanted)
    found = json.loads(report.read_text("utf-8"))["install"]
    return {each["metadata"]["name"].lower().replace("_", "-") for each in found}


def tensorflows(names):
    return {
        name for name in names if re.match(r"(tensorflow|tf-nightly)(-cpu)?$", name)
    }


@pytest.mark.slow
def test_beside_tensorflow_cpu_no_second_tensorflow_is_installed(wheel, tmp_path):
    names = resolved(tmp_path, wheel, "tensorflow-cpu")
    assert {"bn-callbacks", "keras", "numpy", "tensorboard"} <= names
    assert tensorflows(names) == {"tensorflow-cpu"}


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


@pytest.mark.slow
def test_tensorflow_comes_with_extras_alone(metadata):
    extras = re.findall(
        r"^Requires-Dist: tensorflow\S*; extra == '(\w+)'", metadata, re.M
    )
    assert sorted(extras) == ["demo", "dev", "tensorflow", "test"]
    core = re.findall(r"^Requires-Dist: ([\w-]+)>=\S+$", metadata, re.M)
    assert core == ["keras", "numpy", "tensorboard"]


@pytest.mark.slow
def test_the_text_for_a_package_index_needs_no_file_of_the_clone(metadata):
    fields, _, text = metadata.partition("\n\n")
    assert f"\nVersion: {bn_callbacks.__version__}\n" in fields
    assert text.startswith("# bn_callbacks\n")
    assert not re.search(r"\]\((?!https?:)|<!--|<img|\.\[|From a clone", text)
    assert 'pip install "bn-callbacks[tensorflow]"' in text
    for title in re.findall(r"^## .*$", README.read_text("utf-8"), re.MULTILINE):
        assert (title in text) == (title != "## Documentation")


@pytest.mark.slow
def test_the_wheel_alone_says_what_to_install(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    program = tmp_path / "venv/bin/python"
    pip("install", wheel, program=program)
    assert python("import tensorflow", program=program).returncode == 1
    done = python("import sys; " + RUN_DEMO, program=program, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("bn-callbacks: TensorFlow is not installed: run ")
    assert INSTALL in done.stderr
