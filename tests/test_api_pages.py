"""The site of the README, docs/ and the docstrings is built, without a warning and without the network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("api_pages", ROOT / "tools" / "api_pages.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_public_name_is_listed_and_described(site):
    api_pages = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(api_pages)
    landing = (site / "api" / "index.html").read_text()
    for package in api_pages.PACKAGES:
        page = (site / "api" / f"{package}.html").read_text()
        also = {path: path for paths in api_pages.also(package).values() for path in paths}
        names = api_pages.public(package) | also
        assert len(names) > 20
        for name, path in names.items():
            assert f"#{path}" in landing, name
            defined = (path.startswith(package) and path.endswith(f".{name}")) or name == path
            assert f'id="{path if defined else f"{package}.{name}"}"' in page, name


@pytest.mark.parametrize("package", ["mistral_torch", "mistral_flax", "mistral_tf"])
def test_what_a_class_inherits_is_described(site, package):
    page = (site / "api" / f"{package}.html").read_text()
    for name in ("generate", "from_pretrained", "save_pretrained", "resize_token_embeddings"):
        assert f'id="{package}.heads.MistralForCausalLM.{name}"' in page, name


def test_the_first_page_is_the_readme_with_its_links_led_on(site):
    page = (site / "index.html").read_text()
    assert 'href="generation.html"' in page
    assert "docs/generation.md" not in page
