"""What the distributions are made of: the packages with their data, licences and addresses, and nothing else."""

from __future__ import annotations

import email
import email.message
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from kalm_rag import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
TOP = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
"""At the top of every sdist; hatchling adds .gitignore, so that a wheel built from it leaves out the same files."""


@dataclass(frozen=True)
class Project:
    """A folder with a pyproject.toml: where its package is, the files of it that are not Python, and its notices."""

    folder: str
    name: str
    source: str
    package: str
    data: frozenset[str] = frozenset({"py.typed"})
    notices: frozenset[str] = frozenset({"LICENSE"})
    top: frozenset[str] = frozenset()

    def modules(self) -> set[str]:
        """What is expected of the package in a wheel."""
        place = ROOT / self.folder / self.source
        python = {str(path.relative_to(place)) for path in (place / self.package).rglob("*.py")}
        return python | {f"{self.package}/{name}" for name in self.data}


PROJECTS = [
    Project(
        ".",
        "kalm-rag",
        "",
        "kalm_rag",
        frozenset(
            {
                "py.typed",
                "demo_data/LICENSE-PSF-2.0.txt",
                "demo_data/NOTICE",
                "demo_data/corpus.jsonl",
                "demo_data/qrels.tsv",
                "demo_data/queries.jsonl",
                "evaluation/report.html.j2",
                "evaluation/thresholds.html.j2",
                "serving/page/icon.svg",
                "serving/page/index.html",
                "serving/page/page.css",
                "serving/page/page.js",
                "serving/page/requests.js",
                "serving/page/results.js",
                "mini/README.md",
                "mini/config.json",
                "mini/model.safetensors",
                "mini/tokenizer.json",
                "mini/tokenizer_config.json",
                "mini/training.json",
            }
        ),
        frozenset({"LICENSE", "kalm_rag/demo_data/LICENSE-PSF-2.0.txt", "kalm_rag/demo_data/NOTICE"}),
        frozenset({"hatch_build.py", "CITATION.cff", "SECURITY.md"}),
    ),
    Project("integrations/langchain", "langchain-kalm", "", "langchain_kalm"),
    Project(
        "integrations/llama-index",
        "llama-index-postprocessor-kalm-rerank",
        "",
        "llama_index/postprocessor/kalm_rerank",
    ),
    Project("integrations/haystack", "kalm-haystack", "src", "haystack_integrations/components/rankers/kalm"),
]
each = pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four, built as `make dist` does: the wheel from the unpacked sdist."""
    place = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(ROOT / project.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place


def stem(project: Project) -> str:
    return f"{project.name.replace('-', '_')}-{__version__}"


def wheel(built: Path, project: Project) -> dict[str, bytes]:
    """The files in a wheel."""
    with zipfile.ZipFile(built / f"{stem(project)}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist(built: Path, project: Project) -> dict[str, bytes]:
    """The files in an sdist, below its one folder."""
    found = {}
    with tarfile.open(built / f"{stem(project)}.tar.gz") as archive:
        for member in archive.getmembers():
            top, _, name = member.name.partition("/")
            assert top == stem(project)
            assert member.isfile(), f"{member.name} is not a plain file"
            content = archive.extractfile(member)
            assert content is not None
            found[name] = content.read()
    return found


def metadata(built: Path, project: Project) -> email.message.Message:
    content = wheel(built, project)[f"{stem(project)}.dist-info/METADATA"]
    return email.message_from_bytes(content)


@each
def test_a_wheel_holds_the_package_its_data_and_its_notices(built: Path, project: Project) -> None:
    """No tests, no compiled files, nothing of another room of the repository."""
    info = f"{stem(project)}.dist-info"
    scripts = {f"{info}/entry_points.txt"} if project.name == "kalm-rag" else set()
    about = {f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"}
    licences = {f"{info}/licenses/{name}" for name in project.notices}
    assert set(wheel(built, project)) == project.modules() | about | scripts | licences


@each
def test_an_sdist_holds_what_its_wheel_is_built_from(built: Path, project: Project) -> None:
    """No tests either: they also cover examples, benchmarks and documentation, and run in the repository."""
    source = {f"{project.source}/{name}".lstrip("/") for name in project.modules()}
    assert set(sdist(built, project)) == source | TOP | project.top


@each
def test_notices_are_named_and_whole(built: Path, project: Project) -> None:
    about, packed, unpacked = metadata(built, project), wheel(built, project), sdist(built, project)
    assert set(about.get_all("License-File", [])) == project.notices
    for name in project.notices:
        content = (ROOT / project.folder / name).read_bytes()
        assert packed[f"{stem(project)}.dist-info/licenses/{name}"] == content
        assert unpacked[name] == content
    assert (ROOT / project.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    # The corpus of the demo is under a licence of its own.
    expected = "Apache-2.0 AND PSF-2.0" if "kalm_rag/demo_data/NOTICE" in packed else "Apache-2.0"
    assert about["License-Expression"] == expected


@each
def test_the_page_on_a_package_index_has_no_relative_links(built: Path, project: Project) -> None:
    about = metadata(built, project)
    assert about["Description-Content-Type"] == "text/markdown"
    text = str(about.get_payload())
    targets = re.findall(r"\]\(([^)]*)\)|(?:href|src)=\"([^\"]*)\"|^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    relative = [target for found in targets for target in found if target and not target.startswith("https://")]
    assert targets
    assert not relative


def test_addresses_are_those_of_the_setting(built: Path) -> None:
    """One setting holds them; no other file of the repository repeats one."""
    setting = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"][
        "custom"
    ]
    about = metadata(built, PROJECTS[0])
    urls = dict(line.split(", ", 1) for line in about.get_all("Project-URL", []))
    assert urls == {
        "Documentation": f"{setting['documentation']}/",
        "Repository": setting["repository"],
        "Issues": f"{setting['repository']}/issues",
        "Changelog": f"{setting['repository']}/blob/v{__version__}/CHANGELOG.md",
    }
    text = str(about.get_payload())
    assert f"]({setting['documentation']}/how-to/evaluate/)" in text
    assert f"]({setting['documentation']}/)" in text
    assert f"]({setting['repository']}/blob/v{__version__}/kalm_rag/demo_data/NOTICE)" in text
    base = re.sub(r"^(https://[^/]+).*", r"\1", setting["repository"])
    pages = [*ROOT.glob("*.*"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("integrations/*/*.*")]
    assert [page.name for page in pages if page.is_file() and base in page.read_text("utf-8")] == ["pyproject.toml"]


def test_links_of_the_readme_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\((?!https:)([^)#]+)", text)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@each
def test_classifiers_name_every_python_that_is_tested(built: Path, project: Project) -> None:
    about = metadata(built, project)
    found = about.get_all("Classifier", [])
    assert found == metadata(built, PROJECTS[0]).get_all("Classifier", [])
    claimed = {name.rpartition(" ")[2] for name in found if re.search(r":: 3\.\d+$", name)}
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    tested = set(re.findall(r'"(3\.\d+)"', workflow))
    assert claimed == tested
    assert all(version in SpecifierSet(about["Requires-Python"]) for version in claimed)
    assert min(claimed, key=lambda version: int(version[2:])) == "3.10"
    assert not [name for name in found if name.startswith("License ::")], "the licence is an SPDX expression"
    for kind in ("Development Status", "Intended Audience", "Operating System", "Topic", "Typing"):
        assert any(name.startswith(kind) for name in found)


def test_all_four_are_of_one_version_and_fit_each_other(built: Path) -> None:
    for project in PROJECTS:
        about = metadata(built, project)
        assert about["Version"] == __version__
        if project.name != "kalm-rag":
            needed = next(line for line in about.get_all("Requires-Dist", []) if line.startswith("kalm-rag"))
            assert __version__ in SpecifierSet(needed.removeprefix("kalm-rag"))
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


@each
def test_an_index_accepts_them(built: Path, project: Project) -> None:
    files = [str(path) for path in built.glob(f"{stem(project)}*")]
    assert len(files) == 2
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
