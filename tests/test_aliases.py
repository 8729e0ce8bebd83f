"""Every name of the original documentation: in the file, in overrides, beside the project's own name, and wrong."""

import copy
from typing import Any

import pytest
import yaml

from molmo_model import aliases
from molmo_model.aliases import MODEL_ALIASES, TRAIN_ALIASES, resolve
from molmo_model.config import Params, load_params, params_from_dict, to_dict
from molmo_model.errors import ConfigError
from molmo_model.source_digest import ROOT

MODEL_ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("image_model_type", "openai", {"vision.encoder": "openai"}),
    ("image_model_type", "siglip", {"vision.encoder": "siglip"}),
    ("image_model_type", "dino", {"vision.encoder": "dino"}),
    ("image_model_type", "metaclip", {"vision.encoder": "metaclip"}),
    ("image_default_input_size", [336, 336], {"vision.image_size": 336}),
    ("image_default_input_size", 224, {"vision.image_size": 224}),
    ("image_patch_size", 14, {"vision.patch_size": 14}),
    ("image_emb_dim", 96, {"vision.hidden_size": 96}),
    ("image_mlp_dim", 128, {"vision.intermediate_size": 128}),
    ("image_num_layers", 3, {"vision.num_layers": 3}),
    ("image_num_heads", 2, {"vision.num_heads": 2}),
    ("vit_load_path", "some/folder", {"vision.pretrained": "some/folder"}),
    ("init_path", "some/folder", {"vision.pretrained": "some/folder"}),
    ("vit_layers", [-2, -9], {"vision.feature_layers": [-2, -9]}),
    ("image_pooling_2d", None, {"connector.pooling": "none", "connector.pooling_size": [1, 1]}),
    ("image_pooling_2d", "none", {"connector.pooling": "none", "connector.pooling_size": [1, 1]}),
    ("image_pooling_2d", "2", {"connector.pooling": "mean", "connector.pooling_size": [2, 2]}),
    ("image_pooling_2d", 4, {"connector.pooling": "mean", "connector.pooling_size": [4, 4]}),
    ("image_pooling_2d", "attention", {"connector.pooling": "attention", "connector.pooling_size": [2, 2]}),
    ("image_pooling_2d", "attention-meanq", {"connector.pooling": "attention_meanq"}),
    ("image_pooling_2d", "attention_meanq", {"connector.pooling": "attention_meanq"}),
    ("image_pooling_2d", "attention-meanq-2x", {"connector.pooling": "attention_meanq_2x"}),
    ("image_pooling_2d", "attention-meanq-4x", {"connector.pooling": "attention_meanq_4x"}),
    ("image_pooling_2d", "attention-2wide", {"connector.pooling": "attention_2wide"}),
    ("image_pooling_2d", "learned_queries", {"connector.pooling": "learned_queries"}),
    ("image_pooling_2d", "c-abstractor", {"connector.pooling": "c_abstractor"}),
    ("image_pooling_2d", "mean", {"connector.pooling": "mean"}),
    ("image_pooling_2d", "stack", {"connector.pooling": "stack"}),
    *[
        (name, value, {"connector.projector": ours})
        for name in ("image_project_type", "image_projector")
        for value, ours in [("linear", "linear"), ("mlp", "mlp"), ("mlpx", "mlpx"), ("2mlp", "mlpx"), ("mlpx2", "mlpx")]
    ],
    ("image_padding_embed", None, {"connector.padding_embedding": "none"}),
    ("image_padding_embed", "pad_embed", {"connector.padding_embedding": "pad_embed"}),
    ("image_padding_embed", "regress", {"connector.padding_embedding": "regress"}),
    ("image_padding_embed", "pad_and_partial_pad", {"connector.padding_embedding": "pad_and_partial_pad"}),
    ("image_feature_dropout", 0.1, {"connector.feature_dropout": 0.1}),
    ("pooling_attention_mask", False, {"connector.pooling_attention_mask": False}),
]
TRAIN_ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    row
    for prefix, component in (("vit", "vision"), ("connector", "connector"), ("llm", "language"))
    for row in [
        (f"{prefix}_freeze", True, {f"optim.{component}.freeze": True}),
        (f"ft_{prefix}", False, {f"optim.{component}.freeze": True}),
        (f"ft_{prefix}", True, {f"optim.{component}.freeze": False}),
        (f"{prefix}_unfreeze_step", 100, {f"optim.{component}.unfreeze_step": 100}),
    ]
]
OURS = {
    "encoder": "image_model_type",
    "image_size": "image_default_input_size",
    "patch_size": "image_patch_size",
    "hidden_size": "image_emb_dim",
    "intermediate_size": "image_mlp_dim",
    "num_layers": "image_num_layers",
    "num_heads": "image_num_heads",
    "feature_layers": "vit_layers",
}


FILE: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())


def raw() -> dict[str, Any]:
    return copy.deepcopy(FILE)


def at(params: Params, path: str) -> Any:
    value = to_dict(params)
    for part in path.split("."):
        value = value[part]
    return value


def test_every_name_has_a_row_here() -> None:
    assert {name for name, *_ in MODEL_ROWS} == set(MODEL_ALIASES)
    assert {name for name, *_ in TRAIN_ROWS} == set(TRAIN_ALIASES)


@pytest.mark.parametrize(("name", "value", "expected"), MODEL_ROWS)
def test_a_name_in_a_model(name: str, value: Any, expected: dict[str, Any]) -> None:
    file = raw()
    model = file["models"]["base"]
    for path in expected:  # what the name stands for must not be there twice
        section, key = path.split(".")
        model[section].pop(key, None)
    model["vision"][name] = value
    before = copy.deepcopy(file)
    params = params_from_dict(file, "params.yaml")
    assert {path: at(params, f"models.base.{path}") for path in expected} == expected
    assert file == before  # the caller's mapping is left alone
    other = {**file, "models": {"base": {**model, "vision_backbone": model["vision"]}}}
    del other["models"]["base"]["vision"]
    assert resolve(other, ()) == resolve(file, ())


@pytest.mark.parametrize("section", ["vision", "vision_backbone"])
@pytest.mark.parametrize(("name", "value", "expected"), MODEL_ROWS)
def test_a_name_in_an_override_of_a_model(section: str, name: str, value: Any, expected: dict[str, Any]) -> None:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    _, overrides = resolve(raw(), [f"models.base.{section}.{name}={text}"])
    wanted = {f"models.base.{path}": value for path, value in expected.items()}
    found = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in overrides)}
    assert {key: found[key] for key in wanted if "pooling_size" not in key or key in found} == {
        key: value for key, value in wanted.items() if "pooling_size" not in key or key in found
    }


def test_all_forms_of_an_override_reach_the_params() -> None:
    named = ["image_pooling_2d='4'", "image_default_input_size=[32, 32]", "vit_layers=[-1]", "image_projector=2mlp"]
    models = load_params(ROOT / "params.yaml", [f"models.base.vision_backbone.{one}" for one in named]).models["base"]
    assert (models.connector.pooling.value, models.connector.pooling_size) == ("mean", [4, 4])
    assert (models.vision.image_size, models.vision.feature_layers) == (32, [-1])
    assert models.connector.projector.value == "mlpx"


@pytest.mark.parametrize(("name", "value", "expected"), TRAIN_ROWS)
def test_a_name_in_a_run(name: str, value: Any, expected: dict[str, Any]) -> None:
    component = next(iter(expected)).split(".")[1]
    extra = {} if not name.endswith("unfreeze_step") else {name.replace("unfreeze_step", "freeze"): True}
    file = raw()
    file["runs"]["sft"]["train"] |= {name: value, **extra}
    overrides = [f"runs.sft.train.{one}={str(given).lower()}" for one, given in {**extra, name: value}.items()]
    for params in (params_from_dict(file, "p"), params_from_dict(raw(), "p", overrides)):
        assert {path: at(params, f"runs.sft.train.{path}") for path in expected} == expected
        assert at(params, f"runs.sft.train.optim.{component}.learning_rate") == 2e-3  # what stood beside it stays


def test_the_documents_own_example() -> None:
    """The freezing block and the three choices of the original page, as one configuration."""
    file = raw()
    model = file["models"]["base"]
    vision = model.pop("vision")
    renamed = {OURS.get(name, name): value for name, value in vision.items()}
    model["vision_backbone"] = {**renamed, "image_model_type": "siglip", "image_project_type": "mlpx"}
    del model["connector"]["pooling"]
    model["vision_backbone"]["image_pooling_2d"] = "2"
    file["runs"]["sft"]["train"] |= {"vit_freeze": True, "vit_unfreeze_step": 300}
    params = params_from_dict(file, "params.yaml")
    plain = load_params(ROOT / "params.yaml")
    assert params.models["base"].vision == plain.models["base"].vision
    assert params.models["base"].connector.projector.value == "mlpx"
    assert params.runs["sft"].train.optim.vision.unfreeze_step == 300


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ("models.base.vision", {"image_model_type": "openai"}, "another name of vision.encoder, which is given too"),
        ("models.base.vision", {"image_pooling_2d": "2"}, "another name of connector.pooling, which is given too"),
        (
            "models.base.vision",
            {"image_project_type": "mlp", "image_projector": "mlp"},
            "image_projector is another name of connector.projector, which is given too",
        ),
        ("models.base", {"vision_backbone": {}}, "another name of vision, which is given too"),
        ("models.base.vision", {"image_projector": "mlpx3"}, "is 'mlpx3'; known: linear, mlp, mlpx, 2mlp, mlpx2"),
        ("models.base.vision", {"vit_freeze": True}, r"matter of a run; write it in runs.<name>.train"),
        ("runs.sft.train", {"ft_vit": "no"}, "write true or false"),
        ("runs.sft.train", {"vit_freeze": True, "ft_vit": False}, "which is given too"),
        ("runs.sft.train", {"vit_unfreeze_step": 3}, "vision is not frozen"),
        ("runs.sft", {"vit_freeze": True}, "vit_freeze"),
        ("models.base.connector", {"image_projector": "mlp"}, "image_projector"),
    ],
)
def test_what_is_refused(section: str, given: dict[str, Any], message: str) -> None:
    file = raw()
    place = file
    for part in section.split("."):
        place = place[part]
    place.update(given)
    with pytest.raises(ConfigError, match=message):
        params_from_dict(file, "params.yaml")


@pytest.mark.parametrize("size", ["[336, 448]", "[]", "large", "[336, 336, 336]", "[a, a]"])
def test_sizes_that_are_not_square_are_refused_by_name(size: str) -> None:
    with pytest.raises(ConfigError, match=r"vision\.image_default_input_size is .*crops are square"):
        resolve(raw(), [f"models.base.vision.image_default_input_size={size}"])


def test_an_override_wins_over_the_file_whatever_either_is_called() -> None:
    file = raw()
    vision = file["models"]["base"]["vision"]
    vision["image_default_input_size"] = vision.pop("image_size")
    assert params_from_dict(file, "p", ["models.base.vision.image_size=32"]).models["base"].vision.image_size == 32
    named = "models.base.vision.image_default_input_size=[32, 32]"
    assert params_from_dict(raw(), "p", [named]).models["base"].vision.image_size == 32


def test_other_overrides_and_files_pass_unchanged() -> None:
    overrides = ("seed=3", "tasks.scene_qa.max_new_tokens=4", "models.base.vision.encoder=clip", "broken")
    assert resolve(raw(), overrides) == (raw(), overrides)
    assert resolve({"models": None, "runs": [], "version": 2}, ()) == ({"models": None, "runs": [], "version": 2}, ())
    with pytest.raises(ConfigError, match="has no 'image_sizes'"):
        load_params(ROOT / "params.yaml", ["models.base.vision.image_sizes=3"])


def test_all_encoders_and_poolings_of_the_documents_exist() -> None:
    """What an alias stands for is a name that the model's room knows."""
    from molmo_model.model_config import PaddingEmbedding, Pooling, Projector
    from molmo_model.nn.vision_encoder import ENCODER_ALIASES, VISION_ENCODERS

    for name, value, expected in MODEL_ROWS:
        if name == "image_model_type":
            assert ENCODER_ALIASES.get(value, value) in VISION_ENCODERS
        for path, kind in (("pooling", Pooling), ("projector", Projector), ("padding_embedding", PaddingEmbedding)):
            assert expected.get(f"connector.{path}", "none") in [*kind, "none"]
    assert {values["connector.pooling"] for values in aliases._POOLINGS.values()} == {one.value for one in Pooling}


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/guides/original_names.md").read_text()
    assert aliases.table() in page, "run python -m molmo_model.nn.tables"
