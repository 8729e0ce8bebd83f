"""A headless Chromium for tests: the machine's own, else one fetched once, pinned by version and hash.

The one that is fetched is `@sparticuz/chromium` of the npm registry: a Chromium for Linux on x86-64 with the libraries
and fonts that bare machines lack, packed with brotli. It lies below the environment (or `$MOLMO_TEST_BROWSER`); with
`MOLMO_TEST_BROWSER_FETCH=1` it is used even where the machine has one.
"""

import base64
import contextlib
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTALLED = ("chromium", "chromium-browser", "google-chrome")
VERSION = "153.0.0"
ADDRESS = f"https://registry.npmjs.org/@sparticuz/chromium/-/chromium-{VERSION}.tgz"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
"""As the registry states it."""
PACKED = ("chromium.br", "al2023.tar.br", "fonts.tar.br")
"""The program, then archives of its libraries and fonts."""
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""
"""Where that Chromium finds letters on a machine that has none."""


@dataclass(frozen=True)
class Chromium:
    """A program and the environment that it needs."""

    program: Path
    environment: dict[str, str] = field(default_factory=dict)


def find() -> Chromium:
    """`$CHROME`, an installed Chromium, or the pinned one."""
    if os.environ.get("MOLMO_TEST_BROWSER_FETCH") != "1":
        for name in (os.environ.get("CHROME"), *INSTALLED):
            if name and (program := shutil.which(name)):
                return Chromium(Path(program))
    return fetched(Path(os.environ.get("MOLMO_TEST_BROWSER") or Path(sys.prefix) / "chromium"))


def fetched(cache: Path) -> Chromium:
    """The pinned Chromium, unpacked into `cache` if it is not there yet."""
    folder = cache / VERSION
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            unpack(_download(), Path(part) / "whole")
            with contextlib.suppress(OSError):  # another test run was faster
                (Path(part) / "whole").rename(folder)
    libraries = os.pathsep.join(str(place) for place in sorted({file.parent for file in folder.rglob("*.so*")}))
    return Chromium(folder / "chromium", {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(folder / "fonts.conf")})


def unpack(package: bytes, folder: Path) -> None:
    """The browser, its libraries and fonts of a package that has the pinned hash."""
    import brotli

    found = base64.b64encode(hashlib.sha512(package).digest()).decode("ascii")
    if found != SHA512:
        raise RuntimeError(f"{ADDRESS} has SHA-512 {found}, {SHA512} is expected; nothing of it is run")
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        packed = {
            Path(member.name).name: brotli.decompress(files.extractfile(member).read())
            for member in files
            if Path(member.name).name in PACKED
        }
    program = folder / "chromium"
    program.write_bytes(packed["chromium.br"])
    program.chmod(0o755)
    for name in PACKED[1:]:
        with tarfile.open(fileobj=io.BytesIO(packed[name])) as archive:
            archive.extractall(folder, filter="data")
    (folder / "fonts.conf").write_text(FONTS)


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """A running browser, as playwright sees it."""
    from playwright.sync_api import sync_playwright

    chromium = find()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(chromium.program), args=list(FLAGS), env={**os.environ, **chromium.environment}
        )
        try:
            yield browser
        finally:
            browser.close()


def _download() -> bytes:
    with urllib.request.urlopen(ADDRESS, timeout=300) as answer:
        return bytes(answer.read())
