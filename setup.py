"""Builds the two libraries and records what was built.

`pyfeedback/_C.abi3.so` (CPU) is built wherever there is a C++ compiler, `pyfeedback/_C_cuda.abi3.so` where nvcc and a
CUDA build of torch are there too. Both use only the LibTorch Stable ABI of torch 2.10, and are apart so that a torch
without CUDA never meets the CUDA symbols of the second. PYFEEDBACK_CUDA=0 or 1 decides for CUDA whatever is found.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

from build_backend import TORCH_MINIMUM, find_compiler, installed_torch

TORCH_TARGET = ".".join(map(str, TORCH_MINIMUM))
DEFINES = [("TORCH_TARGET_VERSION", f"0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000")]
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter"]
NVCC_FLAGS = ["-O3", "-Xptxas=-v,-warn-spills", "-Xcompiler=-fvisibility=hidden,-Wall", "--expt-relaxed-constexpr"]
# Some linkers drop a library that no symbol is taken from, but libtorch alone leads to libtorch_cuda.
KEEP_ALL = ["-Wl,--no-as-needed"] if sys.platform.startswith("linux") else []
LINK_FLAGS = [*KEEP_ALL, "-ltorch", "-ltorch_cpu"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def stop(message: str) -> None:
    raise SystemExit(f"pyfeedback: {message}")


def find_cuda_home() -> Path | None:
    """The toolkit that `nvcc` belongs to: it says itself, since the one on the path may be a wrapper or a link."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_release(home: Path) -> str:
    output = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match.group(1) if match else "unknown"


def plan_cuda(torch_cuda: str | None, home: Path | None) -> str:
    """Why CUDA is not built, or "" when it is."""
    wish = os.environ.get("PYFEEDBACK_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"PYFEEDBACK_CUDA is {wish!r}; expected 0, 1 or nothing")
    if wish == "0":
        return "PYFEEDBACK_CUDA=0 at the build"
    if wish == "1":
        if home is None:
            stop("PYFEEDBACK_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME")
        return ""
    if torch_cuda is None:
        return "the torch of the build has no CUDA"
    if home is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME"
    release = cuda_release(home)
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is CUDA {release}, torch is built for CUDA {torch_cuda}"
    return ""


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def source_digests() -> dict[str, str]:
    """What the libraries are built from; the package compares it with the sources when it loads them in a clone."""
    here = Path(__file__).parent
    return runpy.run_path(str(here / "pyfeedback" / "backends" / "extension" / "sources.py"))["digests"](here / "csrc")


def first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def hide_paths(include: list[str]) -> list[str]:
    """Flags that leave the build's folders out of what errors say of their place in a source."""
    return [f"-fmacro-prefix-map={folder}/=" for folder in (os.getcwd(), *include)]


def cpu_extension(include: list[str], library: list[str]) -> Extension:
    return Extension(
        "pyfeedback._C",
        sources("checks/*.cpp", "cpu/*.cpp"),
        include_dirs=[*include, os.path.abspath("csrc")],
        library_dirs=library,
        define_macros=DEFINES,
        extra_compile_args={"cxx": [*CXX_FLAGS, *hide_paths(include)]},
        extra_link_args=LINK_FLAGS,
        language="c++",
        py_limited_api=True,
    )


def cuda_extension(include: list[str], library: list[str], home: Path) -> Extension:
    """The runtime is linked statically: the library then asks for no particular libcudart beside torch's own."""
    return Extension(
        "pyfeedback._C_cuda",
        sources("checks/*.cpp", "cuda/*.cpp", "cuda/*.cu"),
        include_dirs=[*include, os.path.abspath("csrc"), str(home / "include")],
        library_dirs=[*library, str(home / "lib64"), str(home / "lib")],
        libraries=["cudart_static", "dl", "pthread", "rt"],
        define_macros=[*DEFINES, ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *hide_paths(include)],
            "nvcc": [*NVCC_FLAGS, *(f"-Xcompiler={flag}" for flag in hide_paths(include))],
        },
        extra_link_args=LINK_FLAGS,
        language="c++",
        py_limited_api=True,
    )


def plan() -> tuple[list[Extension], dict[str, Any], dict[str, Any]]:
    """(extensions, command classes, what goes into _build_info.json); one-line errors for what cannot be built."""
    info: dict[str, Any] = {
        "cpu": False,
        "cuda": False,
        "cuda_architectures": [],
        "torch_target": TORCH_TARGET,
        "built_with_torch": "",
        "compiler": "",
        "missing_cpu": "",
        "missing_cuda": "",
        "sources": source_digests(),
    }
    compiler = find_compiler()
    if compiler is None:
        if os.environ.get("PYFEEDBACK_CUDA") == "1":
            stop("PYFEEDBACK_CUDA=1, but there is no C++ compiler (c++, g++, clang++ or $CXX)")
        info["missing_cpu"] = "no C++ compiler (c++, g++, clang++ or $CXX) was found at the build"
        info["missing_cuda"] = info["missing_cpu"]
        print(
            f"pyfeedback: note: {info['missing_cpu']}: the package is pure Python, and all of it works, but steps of "
            "the optimizers, alignment, depthwise layers and probes are slower",
            file=sys.stderr,
        )
        return [], {}, info
    if shutil.which(compiler.split()[0]) is None:
        stop(f"CXX is {compiler!r}, which is no command")
    if installed_torch() is None:
        stop(f"a C++ compiler is there, but no torch>={TORCH_TARGET} to build against: install torch first")

    import torch
    from torch.utils import cpp_extension

    os.environ["CXX"] = compiler
    home = find_cuda_home()
    info |= {
        "cpu": True,
        "built_with_torch": torch.__version__,
        "compiler": first_line([*compiler.split(), "--version"]),
        "missing_cuda": plan_cuda(torch.version.cuda, home),
    }
    include, library = cpp_extension.include_paths(), cpp_extension.library_paths()
    extensions = [cpu_extension(include, library)]
    if home is not None and not info["missing_cuda"]:
        # torch looks for a toolkit only when it has CUDA itself; its headers need none to compile against.
        cpp_extension.CUDA_HOME = str(home)
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        info |= {"cuda": True, "cuda_architectures": re.split(r"[;\s]+", architectures)}
        extensions.append(cuda_extension(include, library, home))
    return extensions, {"build_ext": cpp_extension.BuildExtension}, info


def command_build_py(info: dict[str, Any]) -> type[build_py]:
    class BuildPython(build_py):
        """Copies the Python files and writes `_build_info.json` beside them."""

        def run(self) -> None:
            if not self.editable_mode:
                # What an earlier build left here would be packaged too, a library for CUDA among it.
                shutil.rmtree(Path(self.build_lib, "pyfeedback"), ignore_errors=True)
            super().run()
            root = Path(self.build_lib, "pyfeedback") if not self.editable_mode else Path("pyfeedback")
            record = {"version": self.distribution.get_version(), **info}
            (root / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
            told = {name: value for name, value in record.items() if name != "sources"}
            print(f"pyfeedback: this build makes {json.dumps(told, indent=2)}")

    return BuildPython


def main() -> None:
    if not Path("pyfeedback/kernels/__init__.py").exists():
        stop("pyfeedback/kernels is no folder, expected a symbolic link to ../kernels: git config core.symlinks true")
    # Metadata and source distributions are made without a compiler and without torch.
    compiles = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
    extensions, commands, info = plan() if compiles else ([], {}, {})
    setup(
        # pyfeedback/kernels is a symbolic link to kernels/, so that the folder of a clone is a whole package.
        packages=find_packages(include=["pyfeedback", "pyfeedback.*"]),
        ext_modules=extensions,
        cmdclass={**commands, "build_py": command_build_py(info)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    )


if __name__ == "__main__":
    main()
