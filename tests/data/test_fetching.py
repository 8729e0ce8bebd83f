"""Asking the web: what servers may do to us, and what addresses are closed."""

import asyncio
import hashlib
import io
import random
import socket
from collections import Counter
from itertools import chain, pairwise

import pytest
from PIL import Image as PilImage

from molmo_model.data.downloads import (
    Download,
    Status,
    Store,
    read_list,
    write_list,
)
from molmo_model.data.fetching import Limits, download, seconds_of
from molmo_model.data.host_turns import HostTurns, Job
from molmo_model.data.public_hosts import Guard, Refused
from molmo_model.errors import ConfigError, StorageError
from pipelines.download import parse
from tests.data.builders import picture
from tests.data.films import film
from tests.data.web import Site, after, answer, head, in_turn, redirect

FAST = {"connect_s": 20.0, "read_s": 20.0, "total_s": 60.0, "retries": 2, "backoff_s": 0.01, "retry_after_s": 2.0}
PNG = picture(1).data


@pytest.fixture
def site():
    with Site() as server:
        yield server


def fetch(folder, urls, *, loopback=True, resolve=None, expected=None, **limits):
    """Rows by URL of one download."""
    rows: dict[str, Download] = {}

    def settled(row):
        assert row.url not in rows
        rows[row.url] = row

    wanted = [(url, (expected or {}).get(url)) for url in urls]
    store = Store(folder)
    download(wanted, store, folder / "part", settled, Limits(**{**FAST, **limits}), loopback=loopback, resolve=resolve)
    assert set(rows) == set(urls)
    assert not (folder / "part").exists()
    return rows


def sha(data):
    return hashlib.sha256(data).hexdigest()


def encoded(kind, **options):
    buffer = io.BytesIO()
    PilImage.new("RGB", (12, 10), (9, 8, 7)).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a hundred bytes whose header says 40,000 x 40,000 pixels."""
    import zlib

    def chunk(name, body):
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    size = (40_000).to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


# ---- answers


def cut(body: bytes, promised: int):
    async def reply(writer):
        writer.write(head(200, {"Content-Length": str(promised)}) + body)

    return reply


def chunked(body: bytes, last: bool):
    async def reply(writer):
        writer.write(head(200, {"Transfer-Encoding": "chunked"}) + b"%x\r\n%b\r\n" % (len(body), body))
        writer.write(b"0\r\n\r\n" if last else b"")

    return reply


def drip(seconds: float):
    async def reply(writer):
        writer.write(head(200))
        for _ in range(1000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(seconds)

    return reply


def raw(data: bytes):
    async def reply(writer):
        writer.write(data)

    return reply


def endless(writer):
    async def reply():
        writer.write(head(200))
        while True:
            writer.write(b"\0" * 65536)
            await writer.drain()

    return reply()


LARGE = b"\0" * 30_000
ANSWERS = {
    # path: (reply, status, http_status, part of the reason, how often it is asked)
    "/ok.png": (answer(PNG), "ok", 200, "", 1),
    "/no-length.png": (answer(PNG, length=False), "ok", 200, "", 1),
    "/chunked.png": (chunked(PNG, last=True), "ok", 200, "", 1),
    "/ok.jpg": (answer(encoded("JPEG"), headers={"Content-Type": "text/plain"}), "ok", 200, "", 1),
    "/ok.mp4": (answer(film(range(0, 10010, 1001))), "ok", 200, "", 1),
    "/moved": (redirect("/ok.png"), "ok", 200, "", 1),
    "/500-then-ok": (in_turn(answer(status=500), answer(PNG)), "ok", 200, "", 2),
    "/cut-then-ok": (in_turn(cut(PNG[:20], len(PNG)), answer(PNG)), "ok", 200, "", 2),
    "/429-then-ok": (in_turn(answer(status=429, headers={"Retry-After": "1"}), answer(PNG)), "ok", 200, "", 2),
    "/404": (answer(b"no", 404), "gone", 404, "answers 404", 1),
    "/410": (answer(PNG, 410), "gone", 410, "answers 410", 1),
    "/403": (answer(b"no", 403), "forbidden", 403, "answers 403", 1),
    "/418": (answer(b"no", 418), "http", 418, "answers 418", 1),
    "/204": (answer(status=204), "http", 204, "answers 204", 1),
    "/503": (answer(status=503), "server_error", 503, "answers 503", 3),
    "/503-far": (
        answer(status=503, headers={"Retry-After": "86400"}),
        "server_error",
        503,
        "'86400', more than 2 s",
        1,
    ),
    "/429-far": (answer(status=429, headers={"Retry-After": "9" * 400}), "rate_limited", 429, "more than 2 s", 1),
    "/429-2099": (
        answer(status=429, headers={"Retry-After": "Thu, 31 Dec 2099 23:59:59 GMT"}),
        *("rate_limited", 429, "31 Dec 2099", 1),
    ),
    "/429-nonsense": (answer(status=429, headers={"Retry-After": "soon"}), "rate_limited", 429, "answers 429", 3),
    "/large": (answer(LARGE), "too_large", 200, "20000 bytes", 1),
    "/large-no-length": (answer(LARGE, length=False), "too_large", 200, "20000 bytes", 1),
    "/large-lie": (answer(b"", headers={"Content-Length": "1" * 15}, length=False), "too_large", 200, "20000", 1),
    "/endless": (endless, "too_large", 200, "20000 bytes", 1),
    "/page": (answer(b"<!doctype html><p>not here", headers={"Content-Type": "image/png"}), "unreadable", 200, "no", 1),
    "/svg": (answer(b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>"), "unreadable", 200, "no image", 1),
    "/playlist": (answer(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/secret\n"), "unreadable", 200, "no film", 1),
    "/empty": (answer(b""), "unreadable", 200, "empty", 1),
    "/gzip": (answer(PNG, headers={"Content-Encoding": "gzip"}), "unreadable", 200, "'gzip'", 1),
    "/moving.gif": (
        answer(encoded("GIF", save_all=True, append_images=[PilImage.new("RGB", (12, 10))])),
        *("unreadable", 200, "2 frames", 1),
    ),
    "/bomb": (answer(bomb()), "too_many_pixels", 200, "max_image_pixels", 1),
    "/cut": (cut(PNG[:30], len(PNG)), "incomplete", 0, "ended early", 3),
    "/cut-chunked": (chunked(PNG[:30], last=False), "incomplete", 0, "ended early", 3),
    "/hang-up": (raw(b""), "connection", 0, "no connection", 3),
    "/nonsense": (raw(b"\0\xffHTTP? no\r\n\r\n"), "protocol", 0, "no answer that can be read", 1),
    "/many-headers": (raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000 + b"\r\n"), "protocol", 0, "no answer", 1),
    "/long-header": (raw(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 10**6 + b"\r\n\r\n"), "protocol", 0, "no answer", 1),
    "/circle": (redirect("/circle"), "redirect", 302, "circle", 1),
    "/circle-2": (redirect("/circle-3"), "redirect", 302, "circle", 1),
    "/steps-0": (redirect("/steps-1"), "redirect", 302, "more than 3 redirects", 1),
    "/nowhere": (answer(status=302), "redirect", 302, "no URL", 1),
    "/bad-port": (redirect("http://h:99999/"), "redirect", 302, "", 1),
    "/to-file": (redirect("file:///etc/hostname"), "redirect", 302, "scheme 'file'", 1),
    "/to-user": (redirect("http://me:secret@127.0.0.1/"), "redirect", 302, "password", 1),
    "/to-private": (
        redirect("http://10.1.2.3/x.png?token=secret"),
        *("blocked", 302, "redirects to http://10.1.2.3: 10.1.2.3 is not a public address", 1),
    ),
    "/to-metadata": (redirect("//169.254.169.254/latest/meta-data"), "blocked", 302, "169.254.169.254", 1),
    "/to-mapped": (redirect("http://[::ffff:192.168.0.1]/"), "blocked", 302, "not a public", 1),
}
MORE = {"/circle-3": redirect("/circle-2")} | {f"/steps-{n}": redirect(f"/steps-{n + 1}") for n in range(1, 9)}


def test_every_answer_leaves_its_row(site, tmp_path):
    site.replies = {path: reply for path, (reply, *_) in ANSWERS.items()} | MORE
    # a name for each path, as if they were hosts, or one that asks to wait would hold up all
    names = {path: f"h{number}.test" for number, path in enumerate(ANSWERS)}

    async def resolve(host):
        return ["127.0.0.1"]

    urls = {path: site.url(path, names[path]) for path in ANSWERS}
    rows = fetch(tmp_path, urls.values(), resolve=resolve, max_bytes=20_000, redirects=3, concurrency=60)
    found = {path: rows[url] for path, url in urls.items()}
    for path, (_, status, http_status, reason, times) in ANSWERS.items():
        row = found[path]
        assert (row.status, row.http_status) == (status, http_status), row
        assert reason in row.reason and row.reason.isprintable() and bool(row.reason) != row.ok, row
        # /moved leads to /ok.png; aiohttp itself asks once more where a connection ends without a word
        wanted = {"/ok.png": 2, "/hang-up": 6}.get(path, times)
        assert site.asked[path] == wanted, path
    assert "secret" not in " ".join(row.reason for row in rows.values())
    good = {path: row for path, row in found.items() if row.ok}
    for path, row in good.items():
        data = Store(tmp_path).path(row.sha256).read_bytes()
        assert (sha(data), len(data)) == (row.sha256, row.bytes)
        assert (row.format, row.width, row.height) == {
            "/ok.jpg": ("JPEG", 12, 10),
            "/ok.mp4": ("MP4", 96, 64),
        }.get(path, ("PNG", 9, 7))
    assert len({row.sha256 for row in good.values()}) == 3
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3  # each content once, and nothing of the others
    assert (
        max(time for time, path in site.times if path == "/429-then-ok")
        - min(time for time, path in site.times if path == "/429-then-ok")
        >= 0.99
    )
    write_list(tmp_path / "list.parquet", rows.values())
    assert {row.url: row for row in read_list(tmp_path / "list.parquet")} == rows


def test_a_server_that_keeps_us_waiting_is_left(site, tmp_path):
    site.replies = {"/drip": drip(0.05), "/silent": after(9, answer(PNG))}
    urls = [site.url(path) for path in site.replies]
    rows = fetch(tmp_path, urls, read_s=0.5, total_s=1.0)
    assert [rows[url].status for url in urls] == [Status.TIMEOUT] * 2
    assert rows[urls[0]].reason == "not done within 1 s"
    assert rows[urls[1]].reason == "no byte for 0.5 s"
    assert set(site.asked.values()) == {3}


def test_a_dead_host_costs_little_and_all_its_rows_are_equal(site, tmp_path):
    """Of one host that is silent, one that limits us, one that has no address, one that leads to a dead one."""
    site.replies = {f"/silent{n}": after(60, answer(PNG)) for n in range(40)}
    site.replies |= {f"/busy{n}": answer(status=429, headers={"Retry-After": "99999"}) for n in range(40)}
    site.replies |= {f"/live{n}": answer(status=500) for n in range(39)} | {"/live39": answer(PNG)}
    site.replies |= {f"/leads{n}": redirect(site.url("/x", "none.test")) for n in range(39)} | {"/leads39": answer(PNG)}
    asked = Counter()

    async def resolve(host):
        asked[host] += 1
        if host == "none.test":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return ["127.0.0.1"]

    kinds = ("silent", "busy", "live", "leads", "none")
    urls = {kind: [site.url(f"/{kind}{n}", f"{kind}.test") for n in range(40)] for kind in kinds}
    every = list(chain(*urls.values()))
    rows = fetch(tmp_path, every, resolve=resolve, read_s=0.3, retries=1, host_failures=6, per_host=4)
    told = {kind: Counter((rows[url].status.value, rows[url].reason) for url in urls[kind]) for kind in kinds}
    assert told["silent"] == {("timeout", "no byte for 0.3 s"): 40}
    assert set(told["busy"].values()) == {40} and "429" in str(told["busy"])
    assert set(told["none"].values()) == {40} and "dns" in str(told["none"])
    assert sorted(told["live"].values()) == sorted(told["leads"].values()) == [1, 39]  # an answer is an answer
    silent = sum(count for path, count in site.asked.items() if path.startswith("/silent"))
    busy = sum(count for path, count in site.asked.items() if path.startswith("/busy"))
    assert 6 * 2 <= silent <= (6 + 4) * 2 and 6 <= busy <= 6 + 4


def test_nothing_is_sent_that_was_not_asked_for(site, tmp_path, monkeypatch):
    """No cookies, no proxy of the environment, no credentials of a .netrc, no compression."""
    with Site() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(netrc))
        site.replies = {
            "/a": redirect("/b"),
            "/b": answer(PNG, headers={"Set-Cookie": "a=b; Path=/"}),
            "/c": answer(PNG),
        }
        rows = fetch(tmp_path / "s", [site.url("/a"), site.url("/b"), site.url("/c")], concurrency=1)
        assert all(row.ok for row in rows.values())
        assert not proxy.asked
    text = "".join(site.requests).lower()
    assert "cookie" not in text and "authorization" not in text
    assert "accept-encoding: identity" in text


def test_an_expected_hash_is_compared(site, tmp_path):
    site.replies = {"/a": answer(PNG), "/b": answer(PNG), "/c": answer(b"a page")}
    urls = [site.url(path) for path in ("/a", "/b", "/c")]
    rows = fetch(tmp_path, urls, expected={urls[0]: sha(PNG), urls[1]: "0" * 64, urls[2]: "1" * 64})
    assert rows[urls[0]].ok
    for url, digest in zip(urls[1:], ("0" * 64, "1" * 64), strict=True):
        assert rows[url].status is Status.CHANGED
        assert digest in rows[url].reason
    assert sha(PNG) in rows[urls[1]].reason


def test_a_host_has_its_limit_and_does_not_hold_up_others(site, tmp_path):
    hosts = ("slow.test", "quick.test", "third.test")
    site.replies = {f"/{n}": after(0.02, answer(PNG)) for n in range(90)}
    site.replies |= {f"/r{n}": redirect(site.url(f"/{n}", "third.test")) for n in range(12)}
    slow = [site.url(f"/{n}", "slow.test") for n in range(60)]
    quick = [site.url(f"/{n}", "quick.test") for n in range(60, 66)]
    moved = [site.url(f"/r{n}", f"m{n}.test") for n in range(12)]

    async def resolve(host):
        return ["127.0.0.1"]

    rows = fetch(tmp_path, [*slow, *quick, *moved], resolve=resolve, concurrency=8, per_host=3)
    assert all(row.ok for row in rows.values())
    assert all(1 <= site.most[host] <= 3 for host in hosts), site.most  # redirects of many hosts to one, too
    assert site.most["slow.test"] == 3 and site.most["all"] <= 8
    order = [path for _, path in site.times]
    assert max(order.index(f"/{n}") for n in range(60, 66)) < order.index("/59")


def test_a_host_that_asks_to_wait_is_left_alone(site, tmp_path):
    site.replies = {f"/{n}": answer(PNG) for n in range(20)}
    site.replies["/0"] = in_turn(answer(status=429, headers={"Retry-After": "1"}), answer(PNG))
    rows = fetch(tmp_path, [site.url(f"/{n}") for n in range(20)], per_host=2, concurrency=2)
    assert all(row.ok for row in rows.values())
    asked = sorted(moment for moment, _ in site.times)
    pauses = [later - sooner for sooner, later in pairwise(asked)]
    assert max(pauses) > 0.9
    assert pauses.index(max(pauses)) <= 3  # only what was in flight already came after it


def test_turns_of_hosts_against_a_plain_simulation():
    for seed in range(30):
        chance = random.Random(seed)
        per_host = chance.randint(1, 3)
        turns = HostTurns(per_host)
        jobs = [Job(f"u{n}", f"h{chance.randint(0, 4)}", None) for n in range(60)]
        for job in jobs:
            turns.add(job)
        now, flying, finished = 0.0, [], Counter()
        paused: dict[str, float] = {}
        while sum(finished.values()) < len(jobs):
            job = turns.take(now) if len(flying) < 6 else None
            if job is not None:
                assert paused.get(job.host, 0) <= now
                flying.append(job)
                assert max(Counter(one.host for one in flying).values()) <= per_host
                continue
            if not flying:
                wait = turns.seconds_to_next(now)
                assert wait is not None, "nothing in flight, nothing due, and URLs are left"
                now += wait + 1e-9
                continue
            now += chance.random()
            job = flying.pop(chance.randrange(len(flying)))
            turns.finish(job)
            if chance.random() < 0.4:
                whole, until = chance.random() < 0.5, now + 3 * chance.random()
                turns.postpone(job, until, whole)
                if whole:
                    paused[job.host] = max(until, paused.get(job.host, 0))
            else:
                finished[job.url] += 1
        assert set(finished.values()) == {1}
        assert turns.take(now + 99) is None and turns.seconds_to_next(now) is None


# ---- addresses

CLOSED = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::a00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b::127.0.0.1", "64:ff9b:1::1", "2002:a00:1::", "2002:7f00:1::1", "100::1"),
    *("2001::1", "3fff::1", "4000::1", "not an address", ""),
)
OPEN = (
    "8.8.8.8",
    "1.1.1.1",
    "172.32.0.1",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "64:ff9b::808:808",
    "2002:808:808::",
)


@pytest.mark.parametrize("address", CLOSED)
def test_addresses_that_are_not_public_are_closed(address):
    assert Guard().problem(address) is not None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(Refused):
        Guard().socket_factory((family, socket.SOCK_STREAM, 6, "", (address, 80)))
    only_own = Guard(loopback=True)
    assert (only_own.problem(address) is None) == (address in ("127.0.0.1", "127.255.255.254", "::1"))


def test_public_addresses_are_open():
    for address in OPEN:
        assert Guard().problem(address) is None, address
    Guard().socket_factory((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))).close()


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://127.0.0.1/", "blocked"),
        ("http://127.1/", "blocked"),
        ("http://2130706433/", "blocked"),
        ("http://0x7f000001/", "blocked"),
        ("http://0x7f.0.0.1/", "blocked"),
        ("http://0177.0.0.1/", "blocked"),
        ("http://017700000001/", "blocked"),
        ("http://127.0.0.1./", "blocked"),
        ("http://①②⑦.⓪.⓪.①/", "blocked"),
        ("http://127。0。0。1/", "blocked"),
        ("http://2852039166/latest/meta-data", "blocked"),
        ("http://[::1]/", "blocked"),
        ("http://[::ffff:7f00:1]/", "blocked"),
        ("http://[0:0:0:0:0:ffff:a9fe:a9fe]/", "blocked"),
        ("http://[fe80::1%25lo]/", "blocked"),
        ("http://[64:ff9b::a9fe:a9fe]/", "blocked"),
        ("http://0/", "blocked"),
        ("http://134744072/", "bad_url"),
        ("http://010.8.8.8/", "bad_url"),
        ("http://me@8.8.8.8/", "bad_url"),
        ("http://:secret@8.8.8.8/", "bad_url"),
        ("ftp://8.8.8.8/a.png", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("gopher://8.8.8.8/", "bad_url"),
        ("data:image/png;base64,AAAA", "bad_url"),
        ("//8.8.8.8/", "bad_url"),
        ("http:///a.png", "bad_url"),
        ("http://8.8.8.8:99999/", "bad_url"),
        ("http://8.8.8.8:port/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("a.png", "bad_url"),
        ("http://8.8.8.8/" + "a" * 9000, "bad_url"),
    ],
)
def test_urls_are_judged_before_anything_is_asked(url, status):
    with pytest.raises(Refused) as refused:
        Guard().check_url(url)
    assert refused.value.status == status
    assert refused.value.reason.isprintable()


def test_a_name_is_judged_by_every_address_it_has(site, tmp_path):
    """Each name is public, private, both, or private only from the second time on."""
    site.replies = {"/a": redirect(site.url("/b", "turns.test")), "/b": answer(PNG)}
    times = Counter()

    async def resolve(host):
        times[host] += 1
        if host == "none.test":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        if host == "busy.test":
            raise socket.gaierror(socket.EAI_AGAIN, "later")
        return {
            "own.test": ["127.0.0.1"],
            "turns.test": ["10.0.0.1"],
            "private.test": ["192.168.0.1"],
            "both.test": ["127.0.0.1", "169.254.169.254"],
            "mapped.test": ["::ffff:10.0.0.1"],
            "odd.test": ["10.1"],
            "empty.test": [],
        }[host]

    hosts = ("private", "both", "mapped", "odd", "empty", "none", "busy", "own")
    rows = fetch(tmp_path, [site.url("/a", f"{host}.test") for host in hosts], resolve=resolve)
    found = {host: rows[site.url("/a", f"{host}.test")].status.value for host in hosts}
    assert found == {
        **dict.fromkeys(("private", "both", "mapped", "odd"), "blocked"),
        **dict.fromkeys(("empty", "none", "busy"), "dns"),
        "own": "blocked",  # itself public, so to say, but it leads to a name that is not
    }
    assert times["none.test"] == 1 and times["busy.test"] == 3  # only what may pass is tried again
    assert site.asked == {"/a": 1}


def test_the_socket_itself_is_the_last_guard(site, tmp_path, monkeypatch):
    """Whatever goes wrong with names and texts, the address that is connected to is judged."""
    site.replies = {"/a": answer(PNG)}

    async def resolve(host):
        return ["127.0.0.1", "10.0.0.1"][: 1 if host == "one.test" else 2]

    guarded = Guard.resolver
    monkeypatch.setattr(Guard, "resolver", lambda self, resolve: guarded(Open(), resolve))
    monkeypatch.setattr(Guard, "check_url", lambda self, text: Open.plain(text))
    urls = [site.url("/a", "one.test"), site.url("/a", "two.test"), site.url("/a")]
    rows = fetch(tmp_path, urls, loopback=False, resolve=resolve, retries=0)
    assert not any(row.ok for row in rows.values())
    assert not site.asked


class Open(Guard):
    """A guard that lets everything pass."""

    def problem(self, address):
        return None

    @staticmethod
    def plain(text):
        from yarl import URL

        return URL(text)


def test_loopback_is_closed_unless_a_test_says_so(site, tmp_path):
    site.replies = {"/a": answer(PNG)}
    urls = [site.url("/a"), site.url("/a", "localhost"), site.url("/a", "127.1"), f"http://[::1]:{site.port}/a"]
    rows = fetch(tmp_path, urls, loopback=False)
    assert {row.status for row in rows.values()} == {Status.BLOCKED}
    assert not site.asked
    assert "loopback" not in Limits.__dataclass_fields__
    with pytest.raises(ConfigError, match="no option"):
        parse(["dataset=a", "loopback=true"])


def test_retry_after_is_read_in_both_forms():
    assert seconds_of("120") == 120 and seconds_of(" 0 ") == 0
    assert 2e9 < seconds_of("Thu, 31 Dec 2099 23:59:59 GMT") < 4e9
    assert seconds_of("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    for nonsense in ("", "soon", "-5", "١٢", "1e9", "Thu, 99 Foo 2099 99:99:99 GMT", "\0"):
        assert seconds_of(nonsense) is None, nonsense


def test_trouble_with_our_own_disk_is_no_failure_of_a_url(site, tmp_path, monkeypatch):
    site.replies = {"/a": answer(PNG)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "adopt", full)
    with pytest.raises(StorageError, match="No space left"):
        fetch(tmp_path, [site.url("/a")])
