from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gradstore.adapters.locations import cache_folder, resolve_location
from gradstore.errors import SpecError


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "package_with_data"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch)

    folder = resolve_location("package:package_with_data/data", "data.train.source")

    assert Path(folder) == tmp_path / "package_with_data" / "data"
    assert Path(resolve_location("package:package_with_data", "model.source")) == tmp_path / "package_with_data"
    assert "package_with_data" not in sys.modules


@pytest.mark.parametrize("source", ["some/folder", "/absolute", "s3://bucket/prefix", "owner/name", "name"])
def test_any_other_source_stays_as_it_is(source: str) -> None:
    assert resolve_location(source, "model.source") == source


@pytest.mark.parametrize("name", ["absent_package", "os.path", "", "json.decoder/data"])
def test_a_package_that_is_not_installed_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"model\.source: 'package:.*' names the Python package .*not installed"):
        resolve_location(f"package:{name}", "model.source")


def test_a_folder_that_a_package_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch)

    with pytest.raises(SpecError, match=r"the package 'package_with_data' has no 'other'"):
        resolve_location("package:package_with_data/other", "data.eval.source")


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_folder({"GRADSTORE_CACHE": "/scratch/cache"}) == Path("/scratch/cache")
    assert cache_folder({}).is_relative_to(Path.home())


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG folders are Linux's")
def test_the_cache_follows_the_xdg_folder_on_linux() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me/gradstore")
    assert cache_folder({}) == Path.home() / ".cache" / "gradstore"
