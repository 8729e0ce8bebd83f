"""Downloads what a dataset names by URL, and writes the list of what could be had.

usage: python -m pipelines.download dataset=NAME [urls=FILE] [from_list=true] [retry=failed] [update=true] [LIMIT=...]

dataset      its name in the params. Its family says which URLs there are
urls         a file of URLs in place of the family's: .txt with one a line, or .jsonl or .parquet with a column `url`
             and perhaps `sha256`; the dataset need not be in the params then
list         where the list is; the dataset's `downloads` in the params, else data/downloads/NAME.parquet
from_list    true: fetches the files that the list names and nothing else, for who has the list and not the files
retry        none: only URLs of which nothing is known yet are asked; failed: dead ones again; all: everything again
update       true: the list may lose files that it has, because they changed or are gone; otherwise that is refused
params       params.yaml; and section.key=value overrides it

limits (LIMIT=VALUE), with what they are if left out:
  concurrency=32 URLs at once, per_host=4 of them; connect_s=15 seconds to connect, read_s=20 without a byte,
  total_s=180 for one attempt; max_bytes=67108864 of a file; max_pixels of a picture, the dataset's `max_image_pixels`;
  redirects=5; retries=3 after 429, 5xx, timeouts and broken connections; backoff_s=1 before the first of them, then
  twice as long; retry_after_s=60, the longest wait that a server may ask for; host_failures=12 URLs of one host in a
  row without an answer, or all with 429, after which the host is asked no more; user_agent=...

The list has one row per URL, failures and their reason included: put it under version control, with git or `dvc add`.
The files lie below $MOLMO_DOWNLOAD_DIR, by default .state/downloads, each once. A run that was stopped or killed goes
on with the same command. Not a stage: what the web answers is no function of the params.
Exit codes: 0 done, 2 refused with a message, 75 stopped (Ctrl-C, SIGTERM) with everything settled so far kept.
"""

import dataclasses
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints
from urllib.parse import urlsplit

from molmo_model.artifacts import file_sha256
from molmo_model.errors import ConfigError, DataError
from molmo_model.storage import is_remote, open_file
from pipelines.stage import arguments, exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.config import DatasetConfig
    from molmo_model.data.download_run import Run
    from molmo_model.data.downloads import Download
    from molmo_model.data.fetching import Limits

OPTIONS = ("dataset", "urls", "list", "from_list", "retry", "update", "params")
NAME = re.compile(r"\w[\w.-]*")
DEFAULT_LIST = "data/downloads/{name}.parquet"
SHOWN_LOST = 5
SHOWN_HOSTS = 5
UNANSWERED = ("dns", "connection", "timeout")
STOPPED = 75
"""Exit code: stopped on request, with everything kept."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    dataset: str
    urls: str | None = None
    list: str | None = None
    from_list: bool = False
    retry: str = "none"
    update: bool = False
    params: str = "params.yaml"
    limits: dict[str, Any] = field(default_factory=dict)
    """Fields of `molmo_model.data.fetching.Limits`."""
    overrides: tuple[str, ...] = ()


def parse(argv: Sequence[str]) -> Request:
    """The request of a command line.

    Raises:
        ConfigError: an unknown, missing, repeated or wrong option, by name.
    """
    from molmo_model.config import lookup
    from molmo_model.data.download_run import Retry
    from molmo_model.data.fetching import Limits

    kinds = get_type_hints(Limits)
    values: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    overrides = []
    for argument in argv:
        name, value = option(argument)
        if "." in name:
            overrides.append(argument)
            continue
        if name not in (*OPTIONS, *kinds) or not value:
            known = ", ".join(f"{known}=..." for known in (*OPTIONS, *kinds))
            raise ConfigError(f"{argument!r} is no option; write one of {known}")
        if name in values or name in limits:
            raise ConfigError(f"{name}= is given twice")
        if name in kinds:
            limits[name] = _limit(name, value, kinds[name])
        else:
            values[name] = value
    for name in ("from_list", "update"):
        if values.setdefault(name, "false") not in ("true", "false"):
            raise ConfigError(f"{name}={values[name]} is neither true nor false")
        values[name] = values[name] == "true"
    if "dataset" not in values:
        raise ConfigError("dataset= is missing; --help shows the usage")
    if not NAME.fullmatch(values["dataset"]):
        raise ConfigError(f"dataset={values['dataset']} must be a name of letters, digits and _ . -")
    lookup({choice.value: choice for choice in Retry}, values.get("retry", "none"), "retry")
    if values["from_list"] and "urls" in values:
        raise ConfigError("from_list=true takes the URLs of the list; leave urls= away")
    return Request(**values, limits=limits, overrides=tuple(overrides))


def _limit(name: str, value: str, kind: type) -> Any:
    from molmo_model.data.datasets.chat_images import MAX_FILE_BYTES

    if kind is str:
        if not value.isascii() or not value.isprintable():
            raise ConfigError(f"{name}={value!r} must be printable ASCII")
        return value
    try:
        number = kind(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value} is no {'whole number' if kind is int else 'number'}") from error
    least = 0 if name in ("redirects", "retries", "retry_after_s") else 1 if kind is int else 0.001
    most = MAX_FILE_BYTES if name == "max_bytes" else 1e12 if name == "max_pixels" else 86400
    if not least <= number <= most:
        raise ConfigError(f"{name}={value} must lie in [{least}, {most:g}]")
    return number


def download(request: Request, loopback: bool = False) -> list[str]:
    """Does what the request says; returns what to print.

    Args:
        loopback: allows servers of this machine, see `molmo_model.data.fetching.download`. Only for tests.

    Raises:
        ConfigError: the dataset names no URLs, or there is no list to start from.
        DataError: files of the list are lost, or nothing could be reached, and `update` is not given; the list is as
            before.
        StorageError: store or list cannot be written.
    """
    from molmo_model.data.download_run import Retry, Run
    from molmo_model.data.downloads import Store, read_list, write_list

    config = _config(request)
    place = request.list or (config and config.downloads) or DEFAULT_LIST.format(name=request.dataset)
    if is_remote(place):
        raise ConfigError(f"the list {place} must be a local file; `dvc push` carries it to storage")
    path = Path(place)
    listed = {row.url: row for row in read_list(path)} if path.exists() else {}
    if request.from_list and not listed:
        raise ConfigError(f"from_list=true, but there is no list {path}; get it, or name it with list=")
    name = f"{request.dataset}.from_list" if request.from_list else request.dataset
    run = Run(name, Store(), listed, file_sha256(path) if listed else "", Retry(request.retry))
    lines: list[str] = []
    with run.alone():
        wanted = _of_list(listed) if request.from_list else _of_source(request, config, lines)
        found = _settle(run, wanted, _limits(request, config), loopback)
        rows = [found.get(url, row) for url, row in listed.items()] if request.from_list else list(found.values())
        lines += _summary(request.dataset, rows, listed)
        if problem := None if request.update else _objection(found, listed, path):
            print("\n".join(lines))
            raise DataError(problem)
        if rows == list(listed.values()):
            lines.append(f"list: {path} stays as it is")
        else:
            write_list(path, rows)
            lines.append(f"list: {path} written; put it under version control")
        run.journal.remove()
    if config is None or config.downloads != str(path):
        lines.append(f"for the params:  datasets.{request.dataset}.downloads: {path}")
    return lines


def _settle(run: "Run", wanted: Mapping[str, str | None], limits: "Limits", loopback: bool) -> "dict[str, Download]":
    """`Run.settle` with a bar on stderr once it takes longer than a few seconds."""
    from tqdm import tqdm

    with tqdm(desc=f"download {run.name}", unit=" URLs", delay=2, mininterval=1) as bar:

        def step(to_ask: int) -> None:
            if to_ask:
                bar.total = to_ask
            else:
                bar.update()

        return run.settle(wanted, limits, step, loopback=loopback)


def _config(request: Request) -> "DatasetConfig | None":
    """The dataset of the params; None where there is none and none is needed."""
    from molmo_model.config import load_params, lookup

    params = load_params(request.params, list(request.overrides))
    if request.dataset not in params.datasets and (request.urls or request.from_list):
        return None
    config: DatasetConfig = lookup(params.datasets, request.dataset, "dataset")
    return config


def _of_list(listed: "Mapping[str, Download]") -> dict[str, str | None]:
    return {url: row.sha256 for url, row in listed.items() if row.ok}


def _of_source(request: Request, config: "DatasetConfig | None", lines: list[str]) -> dict[str, str | None]:
    """Different URLs in their first order, with the expected SHA-256 where the source says it."""
    from molmo_model.data.datasets import FAMILIES, family_of

    if request.urls is not None:
        source = urls_of(request.urls)
    elif config is not None and (urls := family_of(config).urls) is not None:
        source = urls(config)
    else:
        names = ", ".join(name for name, family in FAMILIES.items() if family.urls is not None)
        raise ConfigError(f"dataset {request.dataset!r} names nothing by URL; families that do: {names}; or give urls=")
    wanted: dict[str, str | None] = {}
    repeated = no_text = contradicting = 0
    for url, expected in source:
        sha256 = expected.lower() if expected else None
        if not url or url.encode("utf-8", "replace").decode() != url:
            no_text += 1
            continue
        if url in wanted:
            repeated += 1
            contradicting += None not in (sha256, wanted[url]) and sha256 != wanted[url]
        wanted[url] = wanted.get(url) or sha256
    lines += [f"{repeated} repetitions of URLs are asked for once"] if repeated else []
    lines += [f"{no_text} rows have an empty URL or no Unicode in it; they are not in the list"] if no_text else []
    lines += [f"{contradicting} repetitions name another sha256; the first one counts"] if contradicting else []
    if not wanted:
        raise DataError(f"dataset {request.dataset!r}: there is no URL in {request.urls or 'its data'}")
    return wanted


def urls_of(path: str) -> Iterator[tuple[str, str | None]]:
    """(URL, expected SHA-256 or None) of a user's file: text with a URL a line, or JSONL or Parquet with a column `url`
    and perhaps `sha256`.

    Raises:
        ConfigError: another suffix.
        DataError: a row has no `url`, or a `sha256` that is none, by line.
        StorageError: the file cannot be opened.
    """
    if not path.endswith((".txt", ".jsonl", ".parquet")):
        raise ConfigError(f"urls={path} must end with .txt, .jsonl or .parquet")
    for line, url, sha256 in _text_lines(path) if path.endswith(".txt") else _table_rows(path):
        if not isinstance(url, str) or not url:
            raise DataError(f"{path}:{line}: url is {url!r}; every row needs one")
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
            raise DataError(f"{path}:{line}: sha256 is {sha256!r}; it must be 64 hexadecimal digits, or absent")
        yield url, sha256.lower() if sha256 else None


def _text_lines(path: str) -> Iterator[tuple[int, str, None]]:
    """Blank lines and lines that begin with `#` are passed over."""
    with open_file(path, "r") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.strip(), None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _table_rows(path: str) -> Iterator[tuple[int, Any, Any]]:
    from molmo_model.data.datasets.chat_rows import read_rows

    for row in read_rows(path):
        if row.error is not None:
            raise DataError(f"{path}:{row.line}: {row.error}")
        yield row.line, row.fields.get("url"), row.fields.get("sha256")


def _limits(request: Request, config: "DatasetConfig | None") -> "Limits":
    from molmo_model.data.fetching import Limits

    limits = Limits() if config is None else Limits(max_pixels=config.max_image_pixels)
    return dataclasses.replace(limits, **request.limits)


def _summary(name: str, rows: "Sequence[Download]", listed: "Mapping[str, Download]") -> list[str]:
    """What was kept, what is missing and why, at which hosts, and how the list changes."""
    kept = [row for row in rows if row.ok]
    missing = [row for row in rows if not row.ok]
    contents = {row.sha256: row.bytes for row in kept}
    lines = [
        f"{name}: {len(kept)} of {len(rows)} URLs kept ({len(kept) / len(rows):.1%}), {len(contents)} different files, "
        f"{sum(contents.values()) / 1e6:.1f} MB; {len(missing)} missing"
    ]
    lines += [
        f"  {status:<16}{count:>8}" for status, count in Counter(row.status.value for row in missing).most_common()
    ]
    hosts = Counter(_host(row.url) for row in missing).most_common(SHOWN_HOSTS)
    lines += ["  most at " + ", ".join(f"{host} ({count})" for host, count in hosts)] if hosts else []
    if listed:
        new = sum(row.ok and not (row.url in listed and listed[row.url].ok) for row in rows)
        urls = {row.url for row in rows}
        left = sum(url not in urls for url in listed)
        lines.append(f"against the list before: {new} more kept, {left} URLs no longer in the data")
    return lines


def _host(url: str) -> str:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    return host if host.isprintable() and host else "(no host)"


def _objection(found: "Mapping[str, Download]", listed: "Mapping[str, Download]", path: Path) -> str | None:
    """Why the list should not be written without being told to; None where it may."""
    if listed != found and found and all(row.status in UNANSWERED for row in found.values()):
        return (
            f"none of {len(found)} URLs could be reached, so the list is not written; is there a network? "
            "retry=failed asks again, update=true writes it nevertheless"
        )
    lost = [row for url, row in listed.items() if row.ok and url in found and found[url].sha256 != row.sha256]
    if not lost:
        return None
    shown = "".join(f"\n  {row.url!r}: {_change(row, found[row.url])}" for row in lost[:SHOWN_LOST])
    more = f"\n  and {len(lost) - SHOWN_LOST} more" if len(lost) > SHOWN_LOST else ""
    return (
        f"{len(lost)} files that {path} has cannot be had now; the list stays as it is. retry=failed asks for them "
        f"again, update=true writes the list with what there is now:{shown}{more}"
    )


def _change(before: "Download", now: "Download") -> str:
    return f"{now.status.value}: {now.reason}" if not now.ok else f"has sha256 {now.sha256}, the list {before.sha256}"


def main(argv: Sequence[str] | None = None, loopback: bool = False) -> None:
    """The command line. `loopback` is for tests, which ask their own server: see `download`."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("download"):
        # whoever cancels a run sends SIGTERM: that stops it like Ctrl-C
        before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            print("\n".join(download(parse(argv), loopback)))
        except KeyboardInterrupt:
            print("download: stopped; what is settled is kept, the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
