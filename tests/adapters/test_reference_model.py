"""The reference decoder computes what transformers computes, and the same bits however the work is
cut.

The oracle is transformers in fp32 on checkpoints that transformers itself has written (so that the
safetensors reader meets foreign files), with weights large enough that the context matters. Bad
checkpoint files are made from good ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kvstore.errors import ConfigError, IncompatibleError  # noqa: E402
from kvstore_adapters.reference import checkpoint, safetensors, tokenizer  # noqa: E402
from kvstore_adapters.reference.checkpoint import Checkpoint  # noqa: E402
from kvstore_adapters.reference.model import Chunk, Model, new_pool  # noqa: E402

PAGE_TOKENS = 16
PROMPT = [(i * 37 + i * i * 5) % 250 for i in range(150)]
SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-head-dim-tied-bias": (
        "Llama",
        {"head_dim": 32, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def foreign(
    directory: Path, variant: str, dtype: Any = torch.float32, **save: Any
) -> tuple[Any, Checkpoint]:
    """A random model of transformers, and what we read of the directory that it writes."""
    transformers = pytest.importorskip("transformers")
    family, overrides = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**(SMALL | overrides))
    torch.manual_seed(7)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:  # which transformers starts at 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.to(dtype).save_pretrained(directory, **save)
    return theirs, checkpoint.load(directory)


def new_model(loaded: Checkpoint, pages: int = 16) -> Model:
    return Model(loaded, new_pool(loaded.config, pages, PAGE_TOKENS))


def run(model: Model, tokens: list[int], cuts: list[int], pages: list[int]) -> list[Any]:
    """Logits of the last token of each chunk."""
    edges = [0, *cuts, len(tokens)]
    return [
        model.forward([Chunk(tokens[begin:end], begin, pages)])[0]
        for begin, end in itertools.pairwise(edges)
        if end > begin
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_with_chunked_prefill_and_paged_decode(
    tmp_path: Path, variant: str
) -> None:
    theirs, loaded = foreign(tmp_path, variant)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    pages = [9, 2, 14, 0, 7, 5, 11, 3, 1, 4]  # out of order: the page table is used
    cuts = [1, 17, 70, 71, 128, *range(140, 150)]  # uneven chunks, then one token at a time
    logits = run(new_model(loaded), PROMPT, cuts, pages)
    for end, ours in zip([*cuts, len(PROMPT)], logits, strict=True):
        torch.testing.assert_close(ours, expected[end - 1], atol=1e-4, rtol=1e-4)
        assert ours.argmax() == expected[end - 1].argmax()


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    theirs, loaded = foreign(tmp_path, "llama", torch.bfloat16)
    assert loaded.config.dtype == torch.bfloat16
    ours = run(new_model(loaded), PROMPT, [40], list(range(10)))[-1]
    with torch.inference_mode():
        rounded = theirs(torch.tensor([PROMPT])).logits[0, -1].float()
        exact = theirs.float()(torch.tensor([PROMPT])).logits[0, -1]
    assert (ours - exact).norm() < 1.5 * (rounded - exact).norm()


def test_sharded_checkpoint_is_read_whole(tmp_path: Path) -> None:
    theirs, loaded = foreign(tmp_path, "qwen2", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.weights[name.removeprefix("model.")], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_bits_do_not_depend_on_chunks_or_neighbours(dtype: str, data: st.DataObject) -> None:
    """KV and last logits of PROMPT: in one piece, against drawn chunks each beside a drawn
    neighbour.
    """
    loaded = checkpoint.make_random(size="tiny", dtype=getattr(torch, dtype))
    whole, cut = new_model(loaded, 24), new_model(loaded, 24)
    length = data.draw(st.integers(100, len(PROMPT)), label="length")
    expected = run(whole, PROMPT[:length], [], list(range(10)))[-1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6), label="cuts"))
    edges = [0, *cuts, length]
    pages = [20, 3, 17, 8, 1, 11, 22, 5, 14, 9]
    for begin, end in itertools.pairwise(edges):
        batch = [Chunk(PROMPT[begin:end], begin, pages)]
        row = 0
        if neighbour := data.draw(st.integers(0, 40), label="neighbour"):
            row = begin % 2  # before ours or behind it
            batch.insert(1 - row, Chunk([5] * neighbour, 0, [23, 0, 2]))
        logits = cut.forward(batch)[row]
    assert torch.equal(logits, expected)
    for index in range(length // PAGE_TOKENS):
        assert torch.equal(cut.pool[pages[index]], whole.pool[index])


def test_tokens_depend_on_cached_kv() -> None:
    """The control: were this to pass with wrong KV, the tests above would prove nothing."""
    model = new_model(checkpoint.make_random(size="tiny"))
    pages = list(range(10))
    right = run(model, PROMPT, [144], pages)[-1]
    for page in (0, 4, 8):
        model.pool[page].zero_()
        wrong = model.forward([Chunk(PROMPT[144:], 144, pages)])[0]
        assert (wrong - right).abs().max() > 0.05 * right.abs().max()
        run(model, PROMPT, [144], pages)
    model.pool.zero_()
    assert model.forward([Chunk(PROMPT[144:], 144, pages)])[0].argmax() != right.argmax()


def test_stale_bytes_beyond_a_sequence_do_not_matter() -> None:
    loaded = checkpoint.make_random(size="tiny")
    clean, stale = new_model(loaded), new_model(loaded)
    stale.pool.fill_(float("nan"))
    expected, got = (run(model, PROMPT, [33], list(range(10)))[-1] for model in (clean, stale))
    assert torch.equal(got, expected)


def test_on_layer_sees_its_layer_and_not_the_next() -> None:
    model = new_model(checkpoint.make_random(size="tiny"))
    seen: list[tuple[int, bool, bool]] = []

    def on_layer(layer: int) -> None:
        later = model.pool[0, layer + 1 :]
        seen.append((layer, bool(model.pool[0, layer].any()), bool(later.any())))

    model.forward([Chunk(PROMPT[:16], 0, [0])], on_layer)
    assert seen == [(layer, True, False) for layer in range(model.config.layers)]


def test_random_checkpoint_is_reproducible_and_readable_by_transformers(tmp_path: Path) -> None:
    written = checkpoint.make_random(tmp_path, "tiny", seed=3)
    read = checkpoint.load(tmp_path)
    assert read.config == written.config
    assert all(torch.equal(read.weights[name], w) for name, w in written.weights.items())
    fingerprints = [checkpoint.make_random(size="tiny", seed=seed).fingerprint() for seed in (3, 4)]
    assert read.fingerprint() == fingerprints[0] != fingerprints[1]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0, -1]
    ours = run(new_model(read), PROMPT, [], list(range(10)))[-1]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    checkpoint.make_random(tmp_path, "tiny")
    return tmp_path


def rewrite_header(path: Path, change: Any) -> None:
    """Apply `change` to the parsed header, keeping the data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


NORM = "model.norm.weight"
BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "unknown dtype": (lambda h: h[NORM].update(dtype="F8_E4M3"), "F8_E4M3"),
    "dtype not a string": (lambda h: h[NORM].update(dtype=[1]), "dtype"),
    "negative shape": (lambda h: h[NORM].update(shape=[-256]), "shape"),
    "boolean shape": (lambda h: h[NORM].update(shape=[True, 256]), "shape"),
    "size mismatch": (lambda h: h[NORM].update(shape=[255]), "does not fill"),
    "huge shape": (lambda h: h[NORM].update(shape=[1 << 62, 1 << 62]), "does not fill"),
    "offsets outside": (
        lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 1024]),
        "outside",
    ),
    "offsets reversed": (lambda h: h[NORM].update(data_offsets=[1024, 0]), "outside"),
    "three offsets": (lambda h: h[NORM].update(data_offsets=[0, 1, 2]), "data_offsets"),
    "entry not an object": (lambda h: h.update({NORM: 5}), "not an object"),
    "missing tensor": (lambda h: h.pop(NORM), "no tensor 'norm.weight'"),
    "foreign tensor": (lambda h: h.update({"model.extra": h[NORM]}), "no place for tensor 'extra'"),
    "wrong shape": (lambda h: h[NORM].update(shape=[16, 16]), r"\(16, 16\), not \(256,\)"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_wrong_safetensors_header_is_refused_by_name(good: Path, case: str) -> None:
    change, message = BAD_HEADERS[case]
    rewrite_header(good / "model.safetensors", change)
    with pytest.raises(IncompatibleError, match=message):
        checkpoint.load(good)


FOREIGN_FILES = {
    "empty": b"",
    "short": b"\0" * 7,
    "zip": b"PK\x03\x04" * 30,
    "length 2^64-1": b"\xff" * 64,
    "list": struct.pack("<Q", 2) + b"[]",
    "not JSON": struct.pack("<Q", 4) + b"\xff" * 4,
    "deep JSON": struct.pack("<Q", 200000) + b"[" * 200000,
}


@pytest.mark.parametrize("content", FOREIGN_FILES.values(), ids=FOREIGN_FILES)
def test_foreign_file_is_refused(good: Path, content: bytes) -> None:
    (good / "model.safetensors").write_bytes(content)
    with pytest.raises(IncompatibleError, match=r"model\.safetensors"):
        checkpoint.load(good)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused_wherever_it_ends(
    tmp_path_factory: pytest.TempPathFactory, cut: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    safetensors.write(path, {"a": torch.arange(12.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * cut)])
    with pytest.raises(IncompatibleError):
        safetensors.read(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_never_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, framed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes((struct.pack("<Q", len(noise)) if framed else b"") + noise)
    with contextlib.suppress(IncompatibleError):
        safetensors.read(path)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other family": ({"model_type": "mixtral"}, IncompatibleError, "mixtral"),
    "unknown rope": ({"rope_scaling": {"rope_type": "yarn"}}, IncompatibleError, "yarn"),
    "old rope key": ({"rope_scaling": {"type": "linear"}}, IncompatibleError, "linear"),
    "incomplete llama3": (
        {"rope_scaling": {"rope_type": "llama3"}},
        ConfigError,
        "low_freq_factor",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, IncompatibleError, "quantization_"),
    "sliding window": ({"use_sliding_window": True}, IncompatibleError, "use_sliding_window"),
    "activation": ({"hidden_act": "gelu"}, IncompatibleError, "hidden_act"),
    "layer types": ({"layer_types": ["sliding_attention"]}, IncompatibleError, "layer_types"),
    "no layers": ({"num_hidden_layers": None}, ConfigError, "num_hidden_layers"),
    "string count": ({"hidden_size": "256"}, ConfigError, "hidden_size"),
    "absurd count": ({"num_hidden_layers": 1 << 40}, ConfigError, "num_hidden_layers"),
    "odd heads": ({"num_key_value_heads": 3}, ConfigError, "num_key_value_heads"),
    "negative eps": ({"rms_norm_eps": -1.0}, ConfigError, "rms_norm_eps"),
    "unknown dtype": ({"torch_dtype": "int8"}, IncompatibleError, "int8"),
    "other sizes": ({"hidden_size": 128}, IncompatibleError, "do not fit"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_that_cannot_be_computed_is_refused_by_name(good: Path, case: str) -> None:
    change, error, message = BAD_CONFIGS[case]
    path = good / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        checkpoint.load(good)


def test_missing_directory_and_bad_size_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="size"):
        checkpoint.make_random(size="gigantic")


def test_index_may_not_point_outside_the_directory(good: Path) -> None:
    index = {"weight_map": {NORM: "../model.safetensors"}}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IncompatibleError, match="not a file name"):
        checkpoint.load(good)


def test_byte_tokenizer_returns_the_text(tmp_path: Path) -> None:
    bytes_ = tokenizer.load(tmp_path)
    assert bytes_.decode(bytes_.encode("naïve 猫\n")) == "naïve 猫\n"


def test_tokenizer_file_is_used_when_there_is_one(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).encode("world hello moon") == [1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IncompatibleError, match=r"tokenizer\.json"):
        tokenizer.load(tmp_path)
