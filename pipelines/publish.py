"""Puts the report where others can open it: a bucket of any storage scheme, or a folder.

usage: python -m pipelines.publish to=s3://bucket/reports/name [params=params.yaml] [section.key=value ...]

Refused unless every file of `artifacts/report` verifies and the report is what these params, inputs and sources would
make now. The copy of the page also names the commit of every code digest in it (`python -m pipelines.commits`), and
`provenance.json` beside it lists them with the report's digest and every file's hash. `index.html` goes last and needs
no other file, so whoever opens the address sees the old report or the new one, never a part; what else lies there
stays. Exit codes: 0 published, 2 refused with a message.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molmo_model.artifacts import MANIFEST, Manifest, file_sha256, verify
from molmo_model.errors import ArtifactError, ConfigError
from pipelines import commits, report
from pipelines.stage import arguments, differences, exit_on_error, option

PAGE, DATA, PROVENANCE = "index.html", "report.json", "provenance.json"
NEWEST = 50
"""Commits that are asked for the code digests of a report, about a second each the first time."""


def publish(params: Any, to: str) -> str:
    """Publishes the report; returns the page's address.

    Raises:
        ArtifactError: there is no report, it is damaged, or not up to date.
        StorageError: the place cannot be written.
    """
    from molmo_model import storage

    storage.scheme_of(to)  # a wrong scheme is refused before anything is read
    source = report.STAGE.target({})
    manifest = verify(source, report.STAGE.schema)
    if found := differences(report.STAGE, params, {}):
        raise ArtifactError(f"{source} is not up to date ({found[0]}); run `python -m pipelines.report` first")
    with tempfile.TemporaryDirectory(prefix="molmo-publish-") as folder:
        copy = Path(folder)
        shutil.copytree(source, copy / "files", ignore=shutil.ignore_patterns(MANIFEST))
        _stamp(copy / "files", manifest)
        (copy / "files" / PAGE).rename(copy / PAGE)
        storage.copy_tree(copy / "files", to)
        storage.copy_tree(copy / PAGE, to)
    return storage.join(to, PAGE)


def _stamp(folder: Path, manifest: Manifest) -> None:
    """Writes the commits of all code digests into the page, and `provenance.json` beside it."""
    from molmo_model.eval.report import COMMITS, embedded

    rows = json.loads((folder / DATA).read_text(encoding="utf-8"))
    codes = {row["code"] for row in rows["rows"]} | {run["code"] for run in rows["runs"].values()} | {manifest.code}
    try:
        found = {code: asdict(commit) for code, commit in commits.find(codes, NEWEST).items()}
    except ConfigError:
        found = {}  # a copy of the sources without their history: the page says how to ask elsewhere
    page = (folder / PAGE).read_text(encoding="utf-8")
    if page.count(COMMITS) != 1:
        raise ArtifactError(f"{PAGE} has no single place for commits; run `python -m pipelines.report` again")
    (folder / PAGE).write_text(page.replace(COMMITS, COMMITS.replace("{}", embedded(found))), encoding="utf-8")
    files = {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    document = {"report": manifest.digest, "code": manifest.code, "commits": found, "files": files}
    (folder / PROVENANCE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    from molmo_model.config import load_params

    with exit_on_error("publish"):
        named = [option(word) for word in argv if option(word)[0] in ("to", "params")]
        options = dict(named)
        if not options.get("to") or len(options) < len(named):
            raise ConfigError("write to=PLACE once, such as to=s3://bucket/reports/name")
        overrides = [word for word in argv if option(word)[0] not in ("to", "params")]
        print(publish(load_params(options.get("params", "params.yaml"), overrides), options["to"]))


if __name__ == "__main__":
    main()
