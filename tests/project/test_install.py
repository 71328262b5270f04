"""The installation: the record of the build, the libraries that it lists, and the decisions of the build script."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfeedback
from pyfeedback.backends.extension import loading, sources

ROOT = Path(__file__).parents[2]
PACKAGE = loading.PACKAGE


def run_python(code, folder, **environment):
    """Run `code` in a new interpreter in `folder`, whose packages come first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def source_tree(tmp_path):
    """The Python files only, as in a checkout that was never built."""
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "pyfeedback", ignore=ignored)
    return tmp_path


class TestBuildInfo:
    def test_build_info_is_the_record_of_the_build(self):
        info = pyfeedback.build_info()
        record = json.loads((PACKAGE / "_build_info.json").read_text())
        assert info.version == record["version"] == importlib.metadata.version("pyfeedback")
        assert info.torch_target == "2.10"
        assert info.built_with_torch == record["built_with_torch"]
        assert list(info.cuda_architectures) == record["cuda_architectures"]

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            pyfeedback.build_info().cpu = False

    @pytest.mark.skipif(os.environ.get("PYFEEDBACK_EXTENSION") == "0", reason="PYFEEDBACK_EXTENSION=0")
    def test_with_a_compiler_the_cpu_library_is_built_and_loaded(self):
        info = pyfeedback.build_info()
        assert info.cpu == loading.has_cpu() == bool(info.compiler)
        assert bool(info.compiler) != ("no CPU library" in info.missing)

    def test_cuda_is_loaded_only_into_a_torch_with_cuda(self):
        assert pyfeedback.build_info().cuda == loading.has_cuda()
        if torch.version.cuda is None:
            assert not loading.has_cuda()

    @pytest.mark.parametrize("variable", ["PYFEEDBACK_EXTENSION", "PYFEEDBACK_NATIVE"])
    def test_disabled_by_the_environment(self, tmp_path, variable):
        code = "import pyfeedback; info = pyfeedback.build_info(); print(info.cpu, info.cuda, info.missing)"
        result = run_python(code, tmp_path, **{variable: "0", "PYTHONWARNINGS": "default"})
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("False False no CPU library: PYFEEDBACK_EXTENSION=0")
        old = "DeprecationWarning: PYFEEDBACK_NATIVE=0 is now PYFEEDBACK_EXTENSION=0; the old name"
        assert (old in result.stderr) == (variable == "PYFEEDBACK_NATIVE")

    def test_build_info_reports_a_tree_that_was_never_built(self, source_tree):
        code = "import pyfeedback; print(pyfeedback.__file__, pyfeedback.build_info())"
        result = run_python(code, source_tree)
        assert result.returncode == 0, result.stderr
        assert str(source_tree) in result.stdout
        assert "cpu=False" in result.stdout
        assert "never built" in result.stdout

    def test_a_library_that_does_not_load_is_an_error(self, source_tree):
        shutil.copy(PACKAGE / "_build_info.json", source_tree / "pyfeedback")
        record = json.loads((PACKAGE / "_build_info.json").read_text())
        (source_tree / "pyfeedback" / "_build_info.json").write_text(json.dumps({**record, "cpu": True}))
        (source_tree / "pyfeedback" / "_C.abi3.so").write_bytes(b"no library")
        result = run_python("import pyfeedback", source_tree)
        assert result.returncode != 0
        assert "_C.abi3.so was built but does not load" in result.stderr
        assert run_python("import pyfeedback", source_tree, PYFEEDBACK_EXTENSION="0").returncode == 0


class TestLayout:
    def test_kernels_is_not_a_top_level_package(self, tmp_path):
        code = """
import importlib.util
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("pyfeedback.kernels") is not None
"""
        result = run_python(code, tmp_path)
        assert result.returncode == 0, result.stderr

    def test_types_are_exported(self):
        assert (PACKAGE / "py.typed").exists()

    def test_metadata(self):
        metadata = importlib.metadata.metadata("pyfeedback")
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
        assert sorted(required) == ["numpy", "torch>=2.10"]
        assert {"test", "examples", "lint", "triton"} <= set(metadata.get_all("Provides-Extra"))


def load_script(name, monkeypatch):
    """Import a module from the root of the repository, which is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build_backend(monkeypatch):
    pytest.importorskip("setuptools", reason="the build needs setuptools")
    return load_script("build_backend", monkeypatch)


@pytest.fixture
def setup_script(build_backend, monkeypatch):
    return load_script("setup", monkeypatch)


def fake_torch(folder, version):
    metadata = folder / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


class TestBackend:
    @pytest.mark.parametrize(
        ("version", "requirement"),
        [
            (None, ["torch>=2.10"]),
            ("2.9.1", ["torch>=2.10"]),
            ("2.10.0+cu128", []),
            ("2.13.0", []),
            ("3.0.0a0+git12", []),
        ],
    )
    def test_torch_is_required_only_if_it_is_missing(self, build_backend, monkeypatch, tmp_path, version, requirement):
        if version:
            fake_torch(tmp_path, version)
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(build_backend, "target_site_directories", lambda: [str(tmp_path)])
        monkeypatch.setattr(build_backend, "find_compiler", lambda: "c++")
        assert build_backend.get_requires_for_build_wheel() == requirement
        assert build_backend.get_requires_for_build_editable() == requirement

    @pytest.mark.parametrize("found_by", ["PATH", "CONDA_PREFIX", ".venv"])
    def test_the_environment_that_uv_installs_into_is_found(self, build_backend, monkeypatch, tmp_path, found_by):
        target, clone = tmp_path / ".venv", tmp_path / "clone"
        packages = target / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
        for folder in (packages, clone):
            folder.mkdir(parents=True)
        (target / "pyvenv.cfg").write_text("")
        monkeypatch.setenv("PATH", str(target / "bin") if found_by == "PATH" else "")
        monkeypatch.setenv("CONDA_PREFIX", str(target) if found_by == "CONDA_PREFIX" else "")
        monkeypatch.chdir(clone if found_by == ".venv" else "/")
        assert build_backend.target_site_directories()[-1] == str(packages)

    def test_without_a_compiler_torch_is_not_needed(self, build_backend, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
        assert build_backend.find_compiler() is None
        assert build_backend.torch_requirement() == []

    def test_the_compiler_of_the_environment_comes_first(self, build_backend, monkeypatch):
        monkeypatch.setenv("CXX", "ccache my-c++")
        assert build_backend.find_compiler() == "ccache my-c++"


class TestCudaPlan:
    HOME = Path("toolkit")

    @pytest.fixture(autouse=True)
    def toolkit(self, setup_script, monkeypatch):
        monkeypatch.delenv("PYFEEDBACK_CUDA", raising=False)
        monkeypatch.setattr(setup_script, "cuda_release", lambda home: "13.0")

    @pytest.mark.parametrize(
        ("wish", "torch_cuda", "home", "reason"),
        [
            ("", "13.0", HOME, ""),
            ("", "12.8", HOME, "nvcc is CUDA 13.0, torch is built for CUDA 12.8"),
            ("", None, HOME, "the torch of the build has no CUDA"),
            ("", "13.0", None, "nvcc was found neither on PATH nor in CUDA_HOME"),
            ("0", "13.0", HOME, "PYFEEDBACK_CUDA=0 at the build"),
            ("1", "13.0", HOME, ""),
            ("1", None, HOME, ""),
        ],
    )
    def test_reason(self, setup_script, monkeypatch, wish, torch_cuda, home, reason):
        monkeypatch.setenv("PYFEEDBACK_CUDA", wish)
        assert setup_script.plan_cuda(torch_cuda, home) == reason

    @pytest.mark.parametrize("wish", ["1", "yes"])
    def test_a_build_without_the_requested_device_is_an_error(self, setup_script, monkeypatch, wish):
        monkeypatch.setenv("PYFEEDBACK_CUDA", wish)
        with pytest.raises(SystemExit, match=f"PYFEEDBACK_CUDA.*{wish}"):
            setup_script.plan_cuda("13.0", None)

    def test_cuda_without_a_compiler_is_an_error(self, setup_script, monkeypatch):
        monkeypatch.setenv("PYFEEDBACK_CUDA", "1")
        monkeypatch.setattr(setup_script, "find_compiler", lambda: None)
        with pytest.raises(SystemExit, match="no C\\+\\+ compiler"):
            setup_script.plan()


def test_a_source_that_changed_since_the_build_is_found(tmp_path):
    for name in ("a.cpp", "cpu/b.h", "cuda/d.cu", "cuda_emulator/c.cpp", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    then = sources.digests(tmp_path)
    assert list(then) == ["a.cpp", "cpu/b.h", "cuda/d.cu"]  # the sources of the libraries
    (tmp_path / "a.cpp").touch()
    (tmp_path / "notes.md").write_text("others")
    assert sources.changed(then, sources.digests(tmp_path), cuda=True) is None
    (tmp_path / "cuda" / "d.cu").write_text("other")
    now = sources.digests(tmp_path)
    assert sources.changed(then, now, cuda=False) is None
    assert sources.changed(then, now, cuda=True) == "cuda/d.cu"
    (tmp_path / "cpu" / "b.h").unlink()
    assert sources.changed(then, sources.digests(tmp_path), cuda=False) == "cpu/b.h"
    assert sources.changed({}, now, cuda=False) == "a.cpp"  # the build did not record them
