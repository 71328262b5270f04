"""Pages of the site that are files of the repository, and links between files as links between pages.

A link in a Markdown file is relative to the file, as GitHub expects. On the site, README.md is the home page, the files
of docs/ are at the root, and CONTRIBUTING.md is divided into pages by its sections. A link to a file that is not a page
leads to a copy of the file. A notebook is a page of its text, its code and the output that is stored in it.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Pages made of sections of CONTRIBUTING.md: the title and the sections. Other sections remain on its own page.
SECTIONS = {
    "architecture.md": ("Architecture", ["The layers of the code", "A call, from the layer to the kernel"]),
    "adding_a_rule.md": ("Adding a rule or a layer", ["A new rule", "A new layer"]),
    "adding_a_kernel.md": ("Adding a kernel", ["A new kernel", "Compiled code", "CUDA without a GPU"]),
}
ANCHORS = {
    f"#{re.sub(r'[^a-z0-9 -]', '', name.lower()).replace(' ', '-')})": page
    for page, (_, names) in SECTIONS.items()
    for name in names
}
LINK = re.compile(r"(\]\()([^)#\s]+)([^)\s]*\))")


def on_files(files, config):
    found = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    found["contributing.md"], sections = divided(found["contributing.md"])
    for page, (title, names) in SECTIONS.items():
        found[page] = f"# {title}\n\n" + "\n".join(sections.pop(name) for name in names)
    for path in sorted((ROOT / DOCS).rglob("*.ipynb")):
        uri = path.relative_to(ROOT / DOCS).with_suffix(".md").as_posix()
        files.remove(files.get_file_from_path(path.relative_to(ROOT / DOCS).as_posix()))
        found[uri] = "\n\n".join(cell for cells in json.loads(path.read_text())["cells"] for cell in shown(cells))
    for page, content in found.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    generated = {of: source for source, of in PAGES.items()} | dict.fromkeys(SECTIONS, "CONTRIBUTING.md")
    here = posixpath.dirname(generated.get(page.file.src_uri, DOCS + page.file.src_uri))

    def replaced(match):
        if re.match(r"\w+:", match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(here, match[2]))
        page_of_section = ANCHORS.get(match[3]) if target == "CONTRIBUTING.md" else None
        uri = page_of_section or PAGES.get(target) or re.sub(r"\.ipynb$", ".md", target.removeprefix(DOCS))
        if files.get_file_from_path(uri) is None and (ROOT / target).is_file():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return LINK.sub(replaced, markdown)


def shown(cell):
    """The Markdown of a cell of a notebook, of what it prints and of its figures."""
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    outputs = cell.get("outputs", [])
    printed = "".join(line for output in outputs for line in output.get("text", [])).strip()
    if printed:
        yield f"```text\n{printed}\n```"
    for output in outputs:
        if "image/png" in output.get("data", {}):
            yield f"![figure](data:image/png;base64,{''.join(output['data']['image/png']).strip()})"


def divided(text):
    """The text without the sections that have pages of their own, and these sections by name."""
    wanted = {name for _, names in SECTIONS.values() for name in names}
    start, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    sections = {part.partition("\n")[0]: f"## {part}" for part in parts}
    rest = [section for name, section in sections.items() if name not in wanted]
    return start + "".join(rest), {name: sections[name] for name in wanted}
