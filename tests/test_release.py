"""Version, changelog and citation agree, and the wheel stays small enough to download."""

import re
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import yaml
from source_files import PACKAGE, package_files

import foreseer
from foreseer.checkpoints import zoo

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 40_000_000  # docs/decisions.md says why
source_tree = pytest.mark.skipif(not (ROOT / "src").exists(), reason="needs the source tree")


def deflated(names: list[str]) -> int:
    """Bytes of files in a wheel, which deflates each; names and headers are some kB."""
    return sum(len(zlib.compress((PACKAGE / name).read_bytes())) for name in names)


def test_the_wheel_stays_below_forty_megabytes():
    apart = tuple(f"checkpoints/zoo/{name}/" for name in zoo.APART)
    size = deflated([name for name in package_files() if not name.startswith(apart)])
    assert size < MAX_WHEEL_BYTES, (
        f"the wheel would have {size / 1e6:.1f} MB, the limit is {MAX_WHEEL_BYTES / 1e6:.0f}; "
        "name large hosts in zoo.APART, pyproject.toml and packages/foreseer-zoo."
    )


@source_tree
def test_what_is_apart_is_named_alike_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    left_out = project["tool"]["setuptools"]["exclude-package-data"]["foreseer.checkpoints"]
    links = ROOT / "packages" / "foreseer-zoo" / "src" / "foreseer_zoo" / "zoo"
    assert sorted(left_out) == sorted(f"zoo/{name}/**" for name in zoo.APART)
    assert sorted(path.name for path in links.iterdir()) == sorted(zoo.APART)
    assert all(path.resolve() == zoo.ZOO / path.name for path in links.iterdir())
    needed = project["project"]["optional-dependencies"]["zoo"]
    assert needed == [f"foreseer-zoo>={foreseer.__version__}"]
    told = (links.parent / "__init__.py").read_text()
    assert f'__version__ = "{foreseer.__version__}"' in told


def test_a_name_is_looked_up_in_the_package_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "own")
    monkeypatch.setattr(zoo, "APART_PACKAGE", "zoo_of_this_test")
    (tmp_path / "own" / "small").mkdir(parents=True)
    (tmp_path / "own" / "both").mkdir()
    with pytest.raises(FileNotFoundError, match=r'pip install "foreseer\[zoo\]"'):
        zoo.resolve(f"zoo:{zoo.APART[0]}")
    apart = tmp_path / "site" / "zoo_of_this_test"
    for name in (zoo.APART[0], "both"):
        (apart / "zoo" / name).mkdir(parents=True)
    (apart / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert zoo.resolve(f"zoo:{zoo.APART[0]}") == apart / "zoo" / zoo.APART[0]
    assert zoo.resolve("zoo:both") == tmp_path / "own" / "both"  # a checkout's own
    assert list(zoo.bundled()) == ["both", zoo.APART[0], "small"]
    assert "zoo_of_this_test" not in sys.modules
    for name in ("zoo:../site", "zoo:", "zoo:nothing"):
        with pytest.raises(FileNotFoundError, match="bundled are zoo:both"):
            zoo.resolve(name)


@source_tree
def test_the_changelog_starts_with_this_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == foreseer.__version__ and len(versions) == len(set(versions))
    for link in re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / "CHANGELOG.md").read_text()):
        assert (ROOT / link).exists(), link


@source_tree
def test_the_citation_names_this_version_and_no_invented_person():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["version"] == foreseer.__version__
    assert cited["license"] == project["license"]
    assert cited["authors"] == project["authors"]
    assert cited.keys() >= {"message", "title", "authors"}  # what the schema demands
