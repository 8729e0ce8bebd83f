"""The rates of grouped mixtures, among them those that docs/mixtures.md shows."""

import json
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_model.config import MixtureEntry, MixtureRule, MixtureSchedule, mixture_sources, params_from_dict
from molmo_model.data.mixture import Mixture, resolve
from molmo_model.data.order import SampledSchedule, Schedule, dealt, key_of, resolve_shares
from molmo_model.data.plan import Plan, plan_packs
from molmo_model.data.rates import resolve_rates
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError, DataError
from tests.data.builders import cost_of, rows, train_config

PAGE = Path(__file__).parents[2] / "docs" / "mixtures.md"
EXAMPLES = {"captions": 225, "questions": 81, "points": 36, "photos": 36, "drawings": 36}


def shown(number: int) -> dict[str, Any]:
    """The page's params of that number."""
    return yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number])


def table(column: str) -> dict[str, list[str]]:
    """Rows of the page's table with that column, by their first cell."""
    after = PAGE.read_text(encoding="utf-8").split(column, 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in after.splitlines() if "|" in line]
    return {line[0]: line[1:] for line in cells if not set("".join(line)) <= {"-"}}


def params_with(mixture: dict[str, Any], **run: Any) -> Any:
    raw = yaml.safe_load((PAGE.parents[1] / "params.yaml").read_text(encoding="utf-8"))
    names = re.findall(r"'dataset': '(\w+)'", repr(mixture))
    raw["datasets"] |= {name: {"family": "chat"} for name in names if name != "nowhere"}
    raw["runs"]["sft"] |= {"mixture": mixture, **run}
    return params_from_dict(raw, "params.yaml")


def mixture_of(entries: dict[str, Any]) -> dict[str, MixtureEntry]:
    return params_with(entries).runs["sft"].mixture


def rates(mixture: dict[str, MixtureEntry], examples: dict[str, int]) -> dict[str, float]:
    return {node.name: float(node.rate) for group in resolve_rates(mixture, examples) for node in group.sources()}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardReader]:
    folder = tmp_path_factory.mktemp("shards")
    for name, size in EXAMPLES.items():
        write_shards(rows(range(size * 10 // 9 + 1), name), folder / name, 1_000_000)
    return {name: ShardReader(folder / name) for name in EXAMPLES}


@pytest.mark.parametrize("schedule", MixtureSchedule)
def test_the_page_s_example_draws_what_the_page_says(
    readers: dict[str, ShardReader], schedule: MixtureSchedule, tmp_path: Path
) -> None:
    mixture = resolve(mixture_of(shown(0)["mixture"]), 3, readers, cost_of, schedule)
    assert {entry.name: len(entry.rows) for entry in mixture.entries} == EXAMPLES
    written = table("| of 1,000 examples |\n")
    assert set(written) == set(EXAMPLES)
    drawn = Counter(draw.entry for draw in mixture.draws(range(1000)))
    for name, (rate, count) in written.items():
        share = mixture.order.schedule.shares[[e.name for e in mixture.entries].index(name)]
        assert Fraction(int(share), mixture.order.schedule.period) == Fraction(rate)
        sigma = 0 if schedule is MixtureSchedule.stratified else math.sqrt(1000 * float(rate))
        assert abs(drawn[name] - int(count)) <= 5 * sigma, name

    planned = plan_packs(Plan.of(mixture, readers, train_config()), 100)
    planned.save(tmp_path, {name: reader.index["id"].to_pylist() for name, reader in readers.items()})
    document = json.loads((tmp_path / "mixture.json").read_text())
    tree = document["mixture"]
    counting = tree["pointing"]["entries"]["counting"]
    assert (counting["rule"], counting["rate"], counting["size"]) == ("root_size", 0.1, 45)
    drawings = counting["entries"]["drawings"]
    assert (drawings["rate"], drawings["size"], drawings["examples"]) == (0.05, 9, 36)
    examples = document["packing"]["examples"]
    assert drawings["expected_examples"] == pytest.approx(examples / 20)
    plan = Plan.of(mixture, readers, train_config())
    positions = Counter(draw.entry for pack in range(100) for draw in plan.pack(pack))
    assert sum(positions.values()) == examples
    assert drawings["drawn_examples"] == positions["drawings"]
    assert drawings["epochs"] == pytest.approx(positions["drawings"] / 36, abs=1e-4)
    assert tree["demo"]["entries"]["questions"]["size"] == 900
    loaded = Mixture.load(tmp_path)
    assert loaded.draws(range(400)) == mixture.draws(range(400))
    assert loaded.tree() == tree


def test_molmo_s_mixture_has_the_rates_computed_by_hand() -> None:
    mixture = mixture_of(shown(1)["mixture"])
    sources = mixture_sources(mixture)
    assert len(sources) == 4 + 22 + 6
    found = rates(mixture, dict.fromkeys(sources, 10_000))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    for label, (formula, rate) in table("| entry | by hand | rate |\n").items():
        names = list(mixture["pointing"].entries) if "pointing" in label else [label.split(",")[0]]
        by_hand = eval(formula, {"__builtins__": {}})
        for name in names:
            assert found[name] == pytest.approx(by_hand, abs=1e-6), name
            assert f"{found[name]:.6f}" == rate
    groups = {name: sum(found[inner] for inner in group.entries) for name, group in mixture.items()}
    assert groups == pytest.approx({"demo": 0.15, "academic": 0.5, "pointing": 0.35})
    # a set without a pseudo-size that is four times as large gets twice the weight
    larger = rates(mixture, dict.fromkeys(sources, 10_000) | {"ai2d": 40_000, "pixmo_cap": 10**9})
    assert larger["ai2d"] / larger["text_vqa"] == pytest.approx(2)
    assert larger["pixmo_cap"] == found["pixmo_cap"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.sampled_from([None, 0.3, 1.0, 7.0, 5e4]), st.floats(0.01, 9)), min_size=1
    )
)
def test_a_root_size_group_follows_the_formula(members: list[tuple[int, float | None, float]]) -> None:
    entries = {f"s{i:03}": MixtureEntry("d", rate, size=size) for i, (_, size, rate) in enumerate(members)}
    examples = {name: count for name, (count, _, _) in zip(entries, members, strict=True)}
    mixture = {
        "group": MixtureEntry(rate=2, rule=MixtureRule.root_size, entries=entries),
        "alone": MixtureEntry("d", rate=6),
    }
    found = rates(mixture, examples | {"alone": 5})
    sizes = [n if size is None else n * size if size <= 1 else size for n, size, _ in members]
    weights = np.array([rate for *_, rate in members]) * np.sqrt(sizes)
    assert [found[name] for name in entries] == pytest.approx((0.25 * weights / weights.sum()).tolist(), rel=1e-9)
    assert found["alone"] == 0.75


def test_groups_in_groups_and_hundreds_of_sources() -> None:
    inner = {f"g{k}": MixtureEntry(rule=MixtureRule.root_size, entries=sources(k)) for k in range(20)}
    mixture = {"all": MixtureEntry(rate=3, rule=MixtureRule.root_size, entries=inner), "rest": MixtureEntry("d")}
    examples = {name: 100 + int(name[1:]) for name in mixture_sources(mixture) if name != "rest"} | {"rest": 9}
    nodes = resolve_rates(mixture, examples)
    found = {node.name: node.rate for group in nodes for node in group.sources()}
    assert len(found) == 301 and sum(found.values()) == 1 and found["rest"] == Fraction(1, 4)
    (all_of_it,) = (node for node in nodes if node.name == "all")
    assert all_of_it.size == sum(examples.values()) - 9
    assert [node.path for node in all_of_it.groups_in_it()][:2] == ["all", "all/g0"]
    shares = resolve_shares(found)
    assert len(shares) == 301 and sum(shares.values()) == 2**20
    assert all(abs(share / 2**20 - found[name]) < 1.1 / 2**20 for name, share in shares.items())


def sources(group: int) -> dict[str, MixtureEntry]:
    return {f"s{group * 15 + k:03}": MixtureEntry("d") for k in range(15)}


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ({"g": {"rule": "root_size", "entries": {"a": {"datset": "charts"}}}}, "runs.sft.mixture.g.entries.a.datset"),
        ({"g": {"rule": "rootsize", "entries": {"a": {"dataset": "charts"}}}}, "runs.sft.mixture.g.rule"),
        ({"g": {"entries": {"a": {"entries": {"b": {}}}}}}, r"mixture.g.entries.a.entries.b.dataset: is required"),
        ({"g": {"dataset": "charts", "entries": {"a": {"dataset": "charts"}}}}, r"mixture.g.dataset: .* is a group"),
        ({"g": {"styles": ["x"], "entries": {"a": {"dataset": "charts"}}}}, r"mixture.g.styles: .* is a group"),
        ({"a": {"dataset": "charts", "rule": "root_size"}}, r"mixture.a.rule: .* only a group has one"),
        ({"a": {"dataset": "charts", "size": 5}}, r"mixture.a.size: size is 5.0, .*rule: root_size"),
        ({"g": {"entries": {"a": {"dataset": "charts", "size": 5}}}}, r"mixture.g.entries.a.size"),
        ({"g": {"entries": {"a": {"dataset": "charts", "rate": -1}}}}, r"mixture.g.entries.a.rate is -1"),
        (
            {"a": {"dataset": "charts"}, "g": {"entries": {"a": {"dataset": "charts"}}}},
            "runs.sft.mixture: two sources are called 'a'",
        ),
        ({"g": {"entries": {"a": {"dataset": "nowhere"}}}}, r"runs.sft.mixture.g.entries.a.dataset 'nowhere'"),
        ({"g": {"entries": ["charts"]}}, "params.*: a list stands where"),
        ({"g": {"entries": {"a/b": {"dataset": "charts"}}}}, "a/b"),
    ],
)
def test_mistakes_in_groups_are_refused_by_path(mixture: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        params_with(mixture)
    with pytest.raises(ConfigError, match="schedule"):
        params_with({"a": {"dataset": "charts"}}, schedule="random")


def test_sampled_positions_are_independent_and_follow_the_rates() -> None:
    shares = [1, 2, 7]
    schedule = SampledSchedule(shares, key_of("test"))
    count = 60_000
    entries, draws = dealt(schedule, 0, count)
    found = np.bincount(entries)
    due = np.array(shares) / 10 * count
    assert (np.abs(found - due) < 4 * np.sqrt(due)).all()
    pairs = np.bincount(entries[:-1] * 3 + entries[1:], minlength=9).reshape(3, 3) / count
    assert np.abs(pairs - np.outer(shares, shares) / 100).max() < 0.01  # neighbours know nothing of one another
    assert not np.array_equal(entries[:10], entries[10:20]) and not np.array_equal(entries[:4096], entries[4096:8192])
    assert not np.array_equal(entries, dealt(SampledSchedule(shares, key_of("other")), 0, count)[0])
    for entry in range(3):
        assert draws[entries == entry].tolist() == list(range(found[entry]))


def test_sampled_lookups_agree_with_counting_from_the_start() -> None:
    counted, _ = dealt(SampledSchedule([3, 5], 9), 0, 30_000)
    for n in (0, 1, 4095, 4096, 4097, 20_000, 29_999):
        fresh = SampledSchedule([3, 5], 9)
        assert fresh.counts(n).tolist() == np.bincount(counted[:n], minlength=2).tolist()
        assert fresh.entries(np.array([n]))[0] == counted[n]
    known = SampledSchedule([3, 5], 9).known(20_000)
    again = SampledSchedule([3, 5], 9, known)
    assert again.counts(29_999).tolist() == np.bincount(counted[:29_999]).tolist()
    with pytest.raises(DataError, match="counts of a sampled schedule"):
        SampledSchedule([3, 5], 9, known[1:])


@pytest.mark.slow
def test_eighty_sources_stay_within_one_example_of_their_rates() -> None:
    shares = list(resolve_shares({f"s{i:02}": math.sqrt(1000 + 977 * i) for i in range(80)}).values())
    schedule = Schedule(shares)
    assert schedule.period == 2**20
    for n in np.random.default_rng(0).integers(0, 10**9, 300).tolist():
        assert np.abs(schedule.counts(n) - n * np.array(shares) / schedule.period).max() < 1
