"""A griffe extension that turns the docstrings into Markdown: roles into links, literal blocks and tables into code."""

import re
from pathlib import Path

import griffe

DOCS = Path(__file__).parents[1]
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
TABLE = re.compile(r"^==[= ]+\n.*^==[= ]+$", re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    """Converts the docstring of every object of a package after the package has been loaded."""

    def on_package(self, *, pkg, loader, **_):
        names = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in DOCS.glob("reference/*.md")), re.MULTILINE)
        self.documented = {found.canonical_path: name for name in names if (found := find(pkg, name)) is not None}
        convert_all(pkg, lambda text, obj: self.markdown(text, obj, pkg))

    def markdown(self, text, obj, package):
        text = ROLE.sub(lambda match: self.link(match[1], obj, package), text)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        return TABLE.sub(lambda match: re.sub(r"^", "    ", match[0], flags=re.MULTILINE), text)

    def link(self, name, obj, package):
        """A link to a name in a docstring of ``obj`` if the reference has it, otherwise the name as code."""
        scopes = [obj, obj.parent] if obj.parent is not None else [obj]
        paths = [name, *(f"{scope.path}.{name}" for scope in scopes), f"{obj.module.path}.{name}"]
        for found in filter(None, (find(package, path) for path in paths)):
            path = found.canonical_path
            owner, _, member = path.rpartition(".")
            if path in self.documented:
                return f"[`{name}`][{self.documented[path]}]"
            if owner in self.documented:
                return f"[`{name}`][{self.documented[owner]}.{member}]"
        return f"`{name}`"


def find(package, name):
    """The object of a package with a dotted name, which may be that of an import, or None."""
    start, _, rest = name.partition(".")
    if start != package.name or not rest:
        return None
    try:
        found = package[rest]
        return found.final_target if found.is_alias else found
    except (KeyError, griffe.AliasResolutionError):
        return None


def convert_all(obj, convert):
    if obj.docstring is not None:
        obj.docstring.value = convert(obj.docstring.value, obj)
    for member in obj.members.values():
        if not member.is_alias:
            convert_all(member, convert)
