"""The doctor must not need what it looks for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nas import doctor

ROOT = Path(__file__).resolve().parents[1]

# Runs a command where some modules cannot be imported, as if they were not installed.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from nas.cli import main
main(sys.argv[2:])
"""
EVERYTHING = [module for module, *_ in doctor._PARTS]


def without(modules, *arguments) -> str:
    command = [sys.executable, "-c", WITHOUT, ",".join(m.split(".")[0] for m in modules), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("missing", [EVERYTHING, ["scipy"]], ids=["everything", "scipy"])
def test_what_is_missing_is_told_with_its_purpose_and_the_line_that_brings_it(missing):
    told = without(missing, "doctor")
    for module, package, purpose, extra in doctor._PARTS:
        if module in missing:
            line = re.search(rf"^  missing  {package} \(not installed\): needed for (.*)$", told, re.MULTILINE)
            assert line, told
            assert line[1].startswith(purpose)
            assert line[1].endswith(doctor.install_line(package, extra))
    assert missing == EVERYTHING or "missing  scikit-learn (it needs scipy)" in told
    assert re.search(r"^CPU: .*\d cores", told, re.MULTILINE)
    assert "install nas" not in told  # that name is not ours where packages come from
    assert "install 'nas" not in told


def test_a_runtime_that_is_missing_is_told_with_the_extra_that_brings_it():
    told = without(["openvino", "ai_edge_litert", "iree"], "doctor")
    for name, package in doctor._RUNTIME_PACKAGES.items():
        line = re.search(rf"^runtime {name}: [a-z-]+ is not installed. (.*)$", told, re.MULTILINE)
        assert line, told
        assert line[1] == doctor.install_line(package, name)
    assert re.search(r"^runtime onnxruntime \d.*: float32, int8, mixed$", told, re.MULTILINE)


@pytest.mark.parametrize("what", ["blocks", "devices"])
def test_names_are_listed_without_the_heavy_packages(what):
    assert without(set(EVERYTHING) - {"numpy"}, "list", what)


def test_a_checkout_is_installed_as_a_whole_and_elsewhere_the_package_alone(monkeypatch, tmp_path):
    assert doctor.install_line("jax").endswith(f"-m pip install --editable {ROOT}")
    assert f"{ROOT}[notebook]" in doctor.install_line("matplotlib", "notebook")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "nas" / "doctor.py"))
    assert re.search(r"install '?matplotlib>=", doctor.install_line("matplotlib", "notebook"))
    assert re.search(r"install '?scikit-learn>=", doctor.install_line("scikit-learn"))
    assert doctor.install_line("unheard-of").endswith("install unheard-of")


def test_nobody_is_sent_to_the_package_index_for_a_package_of_our_name():
    """What PyPI has by the name nas is another project, and a board that times a bundle has nothing of this one."""
    kinds = ("*.md", "nas/**/*.py", "experiments/**/*.py", "notebooks/*.ipynb")
    told = [path for kind in kinds for path in ROOT.glob(kind)]
    assert len(told) > 100
    assert [path for path in told if re.search(r"pip install [^`\n]*\bnas\[", path.read_text(encoding="utf-8"))] == []
