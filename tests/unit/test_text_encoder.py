"""text_encoder: representations as gradients, against plain calls of the encoder; what it reads, and what it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradstore.adapters import ADAPTERS, Represents
from gradstore.adapters.encoder import TextEncoder
from gradstore.errors import ContractError, DataError, SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.spec import DataSection, ModelSection, RunSpec, read_spec
from gradstore.spec.evaluation import MislabelSection
from gradstore.stages.contribute import contribute
from gradstore.stages.evaluate import evaluate_mislabel
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.score import score
from gradstore.store.artifacts import ContributionArtifact
from gradstore.store.features import FeatureStore
from tests.encoders import CONTEXT, LAYERS, WIDTH, make_tiny_encoder, write_modules
from tests.models import SENTENCES, Kind, make_tiny_model
from tests.runs import InThisProcess, make_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An encoder that a test may write beside."""
    return make_tiny_encoder(tmp_path / "own")


def adapter(source: Path, texts: Path | str = "nowhere", **options: Any) -> TextEncoder:
    splits = {"train": {"rows": 3}, "learn": {"rows": 1}, "eval": {"rows": 1}}
    data = DataSection.model_validate({"source": str(texts), "length": CONTEXT, **splits})
    return TextEncoder(ModelSection(adapter="text_encoder", source=str(source), options=options), data, 0)


def states(source: Path, text: str) -> list[torch.Tensor]:
    """Hidden states [T, width] of one text, with everything that the library does by itself."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = AutoModel.from_pretrained(source).eval()(**tokens, output_hidden_states=True).hidden_states
    return [of_layer[0].double() for of_layer in found]


def gradients(made: TextEncoder, texts: tuple[str, ...]) -> list[np.ndarray]:
    """Gradients of f of every text alone with respect to all that is trained, in the order of the layers, by autograd."""
    model = made.load("cpu")
    examples = made.query_reader()([{"text": text} for text in texts], truncate=True)
    found = []
    for example in examples:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        output = made.outputs(model, [example])
        assert output.item() == 0
        found.append(np.concatenate([grad[0].numpy() for grad in torch.autograd.grad(output.sum(), parameters)]))
    return found


def test_it_is_found_by_its_name_travels_to_workers_and_says_that_it_represents(encoder: Path) -> None:
    ours = adapter(encoder)

    made = ADAPTERS["text_encoder"](ours.model, ours.data, ours.seed)

    assert isinstance(made, Represents)
    assert pickle.loads(pickle.dumps(made)) == ours


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_gradients_are_what_the_encoder_makes_of_a_text(encoder: Path, pooling: str) -> None:
    pools = {"mean": lambda rows: rows.mean(0), "first": lambda rows: rows[0], "last": lambda rows: rows[-1]}

    found = gradients(adapter(encoder, pooling=pooling), SENTENCES[:3])

    for row, text in zip(found, SENTENCES, strict=False):
        assert row == pytest.approx(pools[pooling](states(encoder, text)[-1]).numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_of_a_language_model_are_representations_too(tmp_path: Path, kind: Kind) -> None:
    source = make_tiny_model(tmp_path / "model", kind)

    (mean,), (last,) = (gradients(adapter(source, pooling=pooling), SENTENCES[:1]) for pooling in ("mean", "last"))

    expected = states(source, SENTENCES[0])[-1].numpy()
    assert mean == pytest.approx(expected.mean(0), abs=1e-5)
    assert last == pytest.approx(expected[-1], abs=1e-5)


def test_every_layer_that_is_asked_for_is_a_group_of_its_own(encoder: Path) -> None:
    (every,), (some,) = (gradients(adapter(encoder, layers=layers), SENTENCES[:1]) for layers in ("all", [0, 2]))

    means = [of_layer.mean(0).numpy() for of_layer in states(encoder, SENTENCES[0])]
    assert every == pytest.approx(np.concatenate(means[1:]), abs=1e-5)
    assert some == pytest.approx(np.concatenate([means[0], means[2]]), abs=1e-5)
    assert [name for name, _ in adapter(encoder, layers="all").load("meta").named_parameters()][-2:] == [
        "layers.1.pooled.weight",
        "layers.2.pooled.weight",
    ]


def test_what_sentence_transformers_puts_around_an_encoder_is_read(own: Path) -> None:
    dense = {"in_features": WIDTH, "out_features": 5, "bias": False}
    identity = "torch.nn.modules.linear.Identity"
    write_modules(
        own,
        "Transformer",
        "Pooling",
        "Dense",
        "Normalize",
        Pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        Dense={**dense, "activation_function": identity},
    )
    weight = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, own / "2_Dense" / "model.safetensors")
    (own / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))

    made = adapter(own)
    (found,) = gradients(made, SENTENCES[:1])

    tokens = adapter(own).encode([SENTENCES[0]], 20)[0]
    assert len(tokens) == 20 < CONTEXT
    model: Any = made.load("cpu").encoder
    with torch.no_grad():
        expected = weight.double() @ model(torch.from_numpy(tokens)[None]).last_hidden_state[0, 0].double()
    assert found == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)
    assert made.identity()["width"] == 5
    (unnormalised,) = gradients(adapter(own, normalize=False), SENTENCES[:1])
    assert unnormalised == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("kinds", "configs", "message"),
    [
        (("Transformer", "Pooling", "CNN"), {"Pooling": {"pooling_mode": "mean"}}, r"has a module CNN at '2_CNN'"),
        (
            ("Transformer", "Pooling"),
            {"Pooling": {"pooling_mode_max_tokens": True}},
            r"pools by pooling_mode_max_tokens",
        ),
        (
            ("Transformer", "Pooling", "Dense"),
            {"Pooling": {"pooling_mode": "mean"}, "Dense": {"in_features": 2, "out_features": 2, "bias": True}},
            r"2_Dense of .* is not linear: bias = True",
        ),
    ],
)
def test_modules_that_are_not_known_are_refused(own: Path, kinds: Any, configs: Any, message: str) -> None:
    write_modules(own, *kinds, **configs)

    with pytest.raises(SpecError, match=message):
        adapter(own).load("cpu")


def test_a_linear_layer_of_another_shape_is_refused(own: Path) -> None:
    dense = {"in_features": WIDTH, "out_features": 5, "bias": False, "activation_function": "Identity"}
    write_modules(own, "Transformer", "Pooling", "Dense", Pooling={"pooling_mode": "mean"}, Dense=dense)
    save_file({"linear.weight": torch.zeros(4, WIDTH)}, own / "2_Dense" / "model.safetensors")

    with pytest.raises(DataError, match=r"linear\.weight \[4, 16\], where its config\.json says \[5, 16\]"):
        adapter(own).load("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"model\.options\.layers: found 3; .* has hidden states 0 to 2"),
        ({"layers": []}, r"model\.options\.layers: found \[\]"),
        ({"layers": [1, 1]}, r"model\.options\.layers: found \[1, 1\]"),
        ({"context": 0}, r"model\.options\.context: found 0"),
        ({"context": CONTEXT + 1}, rf"model\.options\.context: found {CONTEXT + 1}; .* at most {CONTEXT}"),
        ({"pool": "mean"}, r"model\.options\.pool: unknown key"),
        ({"attributed": {"source": "x", "wights": "y"}}, r"model\.options\.attributed\.wights"),
        (
            {"attributed": {"adapter": "diffusion", "source": "x"}},
            r"model\.options\.attributed\.adapter: found 'diffusion'",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(encoder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        adapter(encoder, **options).load("cpu")


@pytest.mark.parametrize(
    ("key", "value"), [("weights", "w.safetensors"), ("peft", "p"), ("gguf_file", "g"), ("output", "cross_entropy")]
)
def test_keys_of_other_adapters_are_refused(encoder: Path, key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"model\.{key}"):
        TextEncoder(
            ModelSection.model_validate({"adapter": "text_encoder", "source": str(encoder), key: value}),
            adapter(encoder).data,
            0,
        )


def spec_of(folder: Path, source: Path, **options: Any) -> RunSpec:
    """A run whose kernel takes features as they are."""
    made = make_run(folder, str(folder / "store"))
    text = made.read_text(encoding="utf-8")
    text = text.replace('kind = "block"', 'kind = "identity"').replace("damping = 0.1\n", "")
    text = text.replace('{ kind = "logra", rank = 4 }', '{ kind = "identity" }')
    made.write_text(text, encoding="utf-8")
    spec = read_spec(made)
    model = ModelSection(adapter="text_encoder", source=str(source), precision="float32", options=options)
    features = spec.features.model_copy(update={"dtype": "float32"})
    return spec.model_copy(update={"model": model, "features": features})


def test_all_stages_take_representations_for_gradients(tmp_path: Path, encoder: Path) -> None:
    spec = spec_of(tmp_path, encoder, layers="all", truncate=True)
    for stage in (featurize, build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)

    store = FeatureStore.open(spec.run.store)
    assert [array.name for array in store.open_set("train").info.arrays] == ["layers.1.pooled", "layers.2.pooled"]
    artifact = ContributionArtifact.open(store.storage, "identity", "eval")
    found = np.concatenate([*artifact.read_blocks(0, 12)], 1)[:2, :3]
    texts = {
        name: [example.text for example in examples_at(store.open_set(name), range(3))] for name in ("eval", "train")
    }
    for query in range(2):
        for row in range(3):
            ours, theirs = (states(encoder, texts[name][at]) for name, at in (("eval", query), ("train", row)))
            expected = [float(ours[layer].mean(0) @ theirs[layer].mean(0)) for layer in range(1, LAYERS + 1)]
            assert found[query, row] == pytest.approx(expected, rel=1e-4)


def test_its_examples_are_those_of_the_attributed_models_own_run(tmp_path: Path, encoder: Path) -> None:
    model = {"source": str(tmp_path / "model")}
    theirs = read_spec(make_run(tmp_path, str(tmp_path / "theirs")))
    ours = make_adapter(spec_of(tmp_path, encoder, attributed=model)).examples().splits
    for name, rows in make_adapter(theirs).examples().splits.items():
        assert [(row.content_hash, row.example_id, row.text) for row in ours[name]] == [
            (row.content_hash, row.example_id, row.text) for row in rows
        ]


def test_texts_that_are_longer_than_the_encoder_reads_are_refused_unless_they_are_to_be_cut(
    tmp_path: Path, encoder: Path
) -> None:
    with pytest.raises(
        DataError, match=r"data\.train: \S+ has \d+ tokens, and .* reads at most 10; \d+ of 48 texts"
    ) as told:
        featurize(spec_of(tmp_path, encoder, context=10), ENGINE, QUIET)
    assert "model.options.truncate = true" in str(told.value)
    assert not (tmp_path / "store").exists()

    featurize(spec_of(tmp_path, encoder, context=10, truncate=True), ENGINE, QUIET)


def test_queries_that_are_longer_than_the_encoder_reads_are_refused_unless_they_are_to_be_cut(encoder: Path) -> None:
    records = [{"text": SENTENCES[1]}]

    with pytest.raises(DataError, match=r"data\.eval: query-1 has \d+ tokens, and .* reads at most 10"):
        adapter(encoder, context=10).query_reader()(records, truncate=False)

    for made in (adapter(encoder, context=10, truncate=True), adapter(encoder)):
        (example,) = made.query_reader()(records, truncate=False)
        assert example.text == SENTENCES[1]


def test_representations_are_kept_as_they_are_unless_another_projection_is_asked_for() -> None:
    split = {"source": "x", "rows": 2}
    values = {
        "run": {"name": "x", "store": "x"},
        "model": {"adapter": "text_encoder", "source": "x"},
        "data": {"train": split, "learn": {**split, "start": 2}, "eval": {**split, "start": 4}},
    }
    dense = {"kind": "dense", "features": 8}

    assert RunSpec.model_validate(values).features.projection == {"kind": "identity"}
    assert RunSpec.model_validate({**values, "features": {"projection": dense}}).features.projection == dense
    own = {**values, "model": {"source": "x"}}
    assert RunSpec.model_validate(own).features.projection["kind"] == "logra"


def test_wrong_labels_are_not_looked_for_by_lengths(tmp_path: Path, encoder: Path) -> None:
    spec = spec_of(tmp_path, encoder, truncate=True)
    featurize(spec, ENGINE, QUIET)
    asked = spec.evaluate.model_copy(update={"mislabel": MislabelSection(examples="none.txt")})

    with pytest.raises(SpecError, match="the store holds representations"):
        evaluate_mislabel(spec.model_copy(update={"evaluate": asked}), ENGINE, QUIET)


def test_an_encoder_of_another_width_does_not_go_into_a_store(tmp_path: Path, encoder: Path) -> None:
    featurize(spec_of(tmp_path, encoder, truncate=True), ENGINE, QUIET)
    other = make_tiny_encoder(tmp_path / "other", width=2 * WIDTH)

    with pytest.raises(ContractError, match=r"model\.width: store has 16, the run asks for 32"):
        featurize(spec_of(tmp_path, other, truncate=True), ENGINE, QUIET)
