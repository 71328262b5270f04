"""The layout of the code: allowed imports, the length of files, and required docstrings."""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
from public_things import public_things

import pyfeedback

ROOT = Path(__file__).parents[2]
PACKAGE = "pyfeedback"
USERS = ("tests", "benchmarks", "examples")  # directories that import the package, but not each other
SHARED = "pyfeedback.testing"  # shapes and inputs for tests and benchmarks; not used by the package
DISPATCH = "pyfeedback.backends.dispatch"  # the only module that chooses an implementation
MOST_LINES = 400

# The modules of the package that each module, or any module inside it, may import: only what is below it.
MAY_IMPORT = {
    "pyfeedback.kernels": {"pyfeedback.kernels"},
    "pyfeedback.core": {"pyfeedback.core"},
    "pyfeedback.backends": {"pyfeedback.core", "pyfeedback.kernels", "pyfeedback.backends"},
    "pyfeedback.ops": {"pyfeedback.core", "pyfeedback.backends", "pyfeedback.ops"},
    "pyfeedback.functional": {"pyfeedback.core", DISPATCH, "pyfeedback.ops"},
    "pyfeedback.rules": {"pyfeedback.core"},
    "pyfeedback.init": {"pyfeedback.core"},
    "pyfeedback.nn": {
        "pyfeedback.core", "pyfeedback.functional", "pyfeedback.rules", "pyfeedback.init", "pyfeedback.nn",
    },
    "pyfeedback.conversion": {
        "pyfeedback.core", "pyfeedback.rules", "pyfeedback.init", "pyfeedback.nn", "pyfeedback.optim",
        "pyfeedback.pretrained",
    },
    "pyfeedback.pretrained": {"pyfeedback.core", "pyfeedback.nn"},
    "pyfeedback.small_start": {"pyfeedback.core"},
    "pyfeedback.tuning": {"pyfeedback.core", "pyfeedback.nn", "pyfeedback.backends.choices", DISPATCH},
    "pyfeedback.__main__": {
        "pyfeedback", "pyfeedback.core", "pyfeedback.rules", "pyfeedback.tuning", "pyfeedback.backends.choices", SHARED,
    },
    "pyfeedback.schedules": {"pyfeedback.core", "pyfeedback.nn", "pyfeedback.rules"},
    "pyfeedback.metrics": {"pyfeedback.core", DISPATCH, "pyfeedback.nn", "pyfeedback.metrics"},
    "pyfeedback.optim": {
        "pyfeedback.core", DISPATCH, "pyfeedback.functional", "pyfeedback.rules", "pyfeedback.nn", "pyfeedback.optim",
    },
    "pyfeedback.guard": {"pyfeedback.core", "pyfeedback.nn", "pyfeedback.optim"},
    "pyfeedback.integrations": {
        "pyfeedback.conversion", "pyfeedback.core", "pyfeedback.init", "pyfeedback.metrics", "pyfeedback.optim",
        "pyfeedback.rules",
    },
    "pyfeedback.reference": set(),
    SHARED: {"pyfeedback.core", "pyfeedback.functional", "pyfeedback.reference"},
}  # fmt: skip

# A module of the package, and the modules that may import it or its submodules.
SEEN_ONLY_BY = {
    "pyfeedback.backends.composite": {DISPATCH, "pyfeedback.backends.extension.ops"},
    "pyfeedback.backends.extension": {"pyfeedback", DISPATCH},
    "pyfeedback.backends.triton": {DISPATCH},
    "pyfeedback.kernels": {DISPATCH, "pyfeedback.backends.triton"},
    "pyfeedback.reference": {"pyfeedback", SHARED},
    SHARED: {"pyfeedback.__main__"},
}


def imports(source, module="", package=False):
    """The dotted names imported anywhere in a source; both a and a.b for ``from a import b``."""
    here = module.split(".") if package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def inside(name, module):
    return name == module or name.startswith(f"{module}.")


def package_modules():
    """Name and path of every module of the package. pyfeedback/kernels is a link, which rglob does not follow."""
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / PACKAGE / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            yield ".".join([prefix, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"), path


@cache
def imports_of(name, path):
    return imports(path.read_text(), name, path.name == "__init__.py")


MODULES = dict(package_modules())


def test_imports_are_found_anywhere_in_a_file():
    source = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom .g import h\nfrom ..i import j\n"
        "def k():\n    import l\n"
    )
    assert imports(source, "x.y.z") == {"a.b", "d", "d.e", "x.y", "x.y.f", "x.y.g", "x.y.g.h", "x.i", "x.i.j", "l"}
    assert imports("from .b import c", "x.y", package=True) == {"x.y.b", "x.y.b.c"}


def test_the_modules_are_found():
    assert {PACKAGE, DISPATCH, SHARED, "pyfeedback.kernels.plan", "pyfeedback.reference"} <= MODULES.keys()
    assert {name for name in MODULES if name.count(".") == 1} == MAY_IMPORT.keys()


# The package


def intruders(module, allowed, modules):
    """Modules outside ``module`` that import it or its submodules without being allowed to."""
    return {
        name
        for name, path in modules.items()
        if not inside(name, module) and name not in allowed and any(inside(i, module) for i in imports_of(name, path))
    }


def test_intruders_are_found(tmp_path):
    for name, source in {
        "table": "from p import inner",
        "other": "import p.inner.deep",
        "well": "import p.innermost",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    modules = {f"p.{name}": tmp_path / f"{name}.py" for name in ("table", "other", "well")}
    assert intruders("p.inner", {"p.table"}, modules) == {"p.other"}


@pytest.mark.parametrize("module", SEEN_ONLY_BY)
def test_a_module_is_imported_only_where_allowed(module):
    assert intruders(module, SEEN_ONLY_BY[module], MODULES) == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name != PACKAGE])
def test_a_module_imports_only_what_is_below_it(name):
    allowed = next(below for above, below in MAY_IMPORT.items() if inside(name, above))
    found = {i for i in imports_of(name, MODULES[name]) if inside(i, PACKAGE)}
    modules = {next(m for m in (i, i.rpartition(".")[0]) if m in MODULES) for i in found} - {PACKAGE}
    packages = {m for m in modules if any(other.startswith(f"{m}.") for other in modules)}
    assert {m for m in modules - packages if not any(inside(m, a) for a in allowed)} == set()


@pytest.mark.parametrize("name", MODULES)
def test_the_package_does_not_import_its_users(name):
    assert not {
        i for i in imports_of(name, MODULES[name]) if any(inside(i, u) for u in (*USERS, "pytest", "benchmark"))
    }


def test_the_reference_imports_only_torch():
    found = imports_of("pyfeedback.reference", MODULES["pyfeedback.reference"])
    assert {name.split(".")[0] for name in found} == {"torch", "warnings"}


@pytest.mark.parametrize("name", ["pyfeedback.core.algorithm", "pyfeedback.core.coefficients"])
def test_the_choice_of_an_algorithm_does_not_import_torch(name):
    found = imports_of(name, MODULES[name])
    assert found
    assert not {i for i in found if i.split(".")[0] in ("torch", "numpy")}
    assert {i for i in found if inside(i, PACKAGE)} <= {
        "pyfeedback.core.coefficients", "pyfeedback.core.coefficients.Coefficients"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in MODULES if inside(name, "pyfeedback.kernels")] or ["pyfeedback.kernels"]
)
def test_kernels_import_only_kernels(name):
    found = imports_of(name, MODULES[name]) if name in MODULES else set()
    assert not {i for i in found if inside(i, PACKAGE) and i != PACKAGE and not inside(i, "pyfeedback.kernels")}


# The users of the package


def foreign_imports(directory, directories):
    """(file, import) for each import in the directory ``directory`` from another directory of ``directories``."""
    own = {path.stem for path in directory.rglob("*.py")}
    theirs = {path.stem for other in directories if other != directory for path in other.rglob("*.py")} - own
    theirs |= {other.name for other in directories if other != directory}
    return {
        (path.name, name)
        for path in directory.rglob("*.py")
        for name in imports(path.read_text())
        if name is not None and name.split(".")[0] in theirs
    }


def test_foreign_imports_are_found(tmp_path):
    directories = [tmp_path / "tests", tmp_path / "benchmarks"]
    for directory in directories:
        directory.mkdir()
    (directories[0] / "cases.py").write_text("")
    (directories[0] / "test_a.py").write_text("from cases import x\nimport benchmarks.speed\n")
    (directories[1] / "speed.py").write_text("def late():\n    from cases import x\n")
    assert foreign_imports(directories[0], directories) == {("test_a.py", "benchmarks.speed")}
    assert foreign_imports(directories[1], directories) == {("speed.py", "cases"), ("speed.py", "cases.x")}


@pytest.mark.parametrize("directory", USERS)
def test_directories_do_not_import_each_other(directory):
    assert foreign_imports(ROOT / directory, [ROOT / user for user in USERS]) == set()


@pytest.mark.parametrize("directory", ["benchmarks", "examples"])
def test_users_do_not_import_kernels(directory):
    """A benchmark selects a backend by pyfeedback.backend. The tools that inspect the kernels are exempt."""
    tools = ("codegen.py", "gpu_model.py", "kernel_instructions.py")
    for path in (p for p in (ROOT / directory).rglob("*.py") if p.name not in tools):
        found = imports(path.read_text())
        assert not {
            i for i in found if any(inside(i, m) for m in ("kernels", "pyfeedback.kernels", "pyfeedback.backends"))
        }


# C++ and CUDA


def included(path, seen=()):
    """Every header that a source of csrc includes, directly or through its own headers."""
    for header in re.findall(r'^\s*#\s*include\s*["<]([^">]+)', path.read_text(), re.MULTILINE):
        yield header
        for own in (path.parent / header, ROOT / "csrc" / header):
            if own.is_file() and own not in seen:
                yield from included(own, (*seen, own))
                break


def test_includes_of_included_headers_are_found(tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.h"\n  #include <cuda.h>\n// #include <no.h>\n')
    (tmp_path / "b.h").write_text("#include <torch/torch.h>\n")
    assert list(included(tmp_path / "a.cu")) == ["b.h", "torch/torch.h", "cuda.h"]


def test_device_code_includes_no_torch():
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    assert sources
    for path in sources:
        assert not [h for h in included(path) if h.split("/")[0] in ("torch", "ATen", "c10")], path.name


# Files and names


def sources():
    patterns = ("pyfeedback/**/*.py", "kernels/**/*.py", "csrc/**/*.*")
    return sorted(
        path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".so"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def undocumented(thing, name):
    """Dotted names without a docstring: ``thing`` and, if it is a class, the public methods that it defines.

    Methods that override those of torch's classes are documented there.
    """
    if not inspect.getdoc(thing) or inspect.getdoc(thing).startswith(f"{getattr(thing, '__name__', '')}("):
        yield name  # the generated docstring of a dataclass or NamedTuple is its signature
    if not inspect.isclass(thing):
        return
    for key, member in vars(thing).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        inherited = any(hasattr(base, key) for base in thing.__mro__[1:])
        if not key.startswith("_") and inspect.isfunction(member) and not inherited and not member.__doc__:
            yield f"{name}.{key}"


def test_undocumented_names_are_found():
    class Documented:
        """Yes."""

        def bare(self): ...

        @property
        def bare_too(self): ...

        def in_words(self):
            """Yes."""

    class Derived(Documented):
        def bare(self): ...

    assert list(undocumented(Documented, "D")) == ["D.bare", "D.bare_too"]
    assert list(undocumented(lambda: None, "f")) == ["f"]
    assert list(undocumented(Derived, "E")) == []  # inherits the docstring and the method


def imported_modules():
    """The Python modules of the package, except those whose import requires triton."""
    found = {m.name for m in pkgutil.walk_packages(pyfeedback.__path__, f"{PACKAGE}.")} & MODULES.keys()
    return [PACKAGE, *sorted(n for n in found if not inside(n, "pyfeedback.kernels"))]


@pytest.mark.parametrize("name", imported_modules())
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert [u for thing, full in public_things(module) for u in undocumented(thing, full)] == []


def test_every_name_the_package_lists_has_a_docstring():
    assert [u for name in pyfeedback.__all__ for u in undocumented(getattr(pyfeedback, name), name)] == []
