"""The models of the pinned cases: few, thin tensors of every kind, seeded by name, in every form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import FAMILIES
from blockmerge.checkpoints import TensorInfo, encode_header
from blockmerge.demo import demo_layout
from blockmerge.dtypes import DTYPES as SPELLINGS
from tests.other_names import in_diffusers

FOLDERS = Path(__file__).with_name("folders.json")
"""The configs of the folders, {family-channels: {path: text}}."""

UNET = "model.diffusion_model."
VAE = "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
_SPELLED = {getattr(torch, one.torch): name for name, one in SPELLINGS.items() if one.torch}
DIFFERENCES = {"a": 0.0, "b": 0.05, "c": 0.2, "d": 0.1}
METADATA = {
    "ss_steps": "100", "modelspec.usage_hint": "is kept", "format": "pt", "note": "/home/me/is-dropped",
    "modelspec.title": "is dropped by merges", "sshs_legacy_hash": "is dropped", "sd_merge_recipe": "{}",
    "modelspec.architecture": "stable-diffusion-v1",
}  # fmt: skip

# What tells the family, convolutions, matrices, joined and transposed ones, and what a folder's configs need.
_KEPT = re.compile(
    r"model\.diffusion_model\.(time_embed\.0|label_emb\.0\.0|input_blocks\.[01]\.|out\.).*"
    r"|model\.diffusion_model\.middle_block\.1\.(norm|proj_in).*"
    r"|model\.diffusion_model\.(input_blocks\.\d+\.0\.in_layers|output_blocks\.[345]\.0\.out_layers)\..*"
    r"|(cond_stage_model|conditioner)\..*(resblocks\.0\.|encoder\.layers\.0\.|text_projection|logit_scale).*"
    r"|(cond_stage_model|conditioner)\..*final.*"
    r"|first_stage_model\.encoder\.(mid\.attn_1|conv_in)\..*"
    r"|.*(transformer_blocks\.0\.attn2\.to_k|token_embedding|position(al)?_(embedding|ids)"
    r"|layers\.0\.mlp\.fc1|resblocks\.(0\.mlp\.c_fc|23\.)|input_blocks\.4\.1\.proj_in|decoder\.conv_(in|out)"
    r"|output_blocks\.\d+\.1\.transformer_blocks\.0\.attn1\.to_[qkv]).*"
)


@dataclass(frozen=True)
class Source:
    """A model: A, B, C or D of a family, in a dtype and a form, with more channels or what else is special.

    Forms are a `file` in LDM names, what torch writes (`zip`, `legacy`), diffusers folders (`folder`, `bin`,
    `shards`, `fp16-variant`), U-Nets alone (`unet`, `diffusers-unet`, `unet-folder`), VAEs alone (`vae`,
    `vae-pt`, `vae-folder`), a state dict in `memory`, and an `opened` file.
    """

    letter: str = "a"
    family: str = "sd1"
    dtype: str = "fp16"
    form: str = "file"
    channels: int = 4
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.family, self.letter, self.dtype, self.form, str(self.channels), *self.extras))


class Inputs:
    """Models as files and folders, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self._made: dict[Source, object] = {}

    def given(self, source: Source) -> object:
        """The model as an argument of `merge`: a path, or what its form says."""
        if source not in self._made:
            home = self._folder / str(source)
            home.mkdir()
            self._made[source] = self._write(source, home)
        return self._made[source]

    def tensors(self, source: Source) -> dict[str, torch.Tensor]:
        """The model as an argument of `merge_state_dicts`, in the naming of its form."""
        if source.form == "folder":
            return _of_folder(self.given(source), ".")
        if source.form == "diffusers-unet":
            return load_file(self.given(source))
        model = ldm_model(source)
        if source.form == "unet":
            return {
                name.removeprefix(UNET): tensor for name, tensor in model.items() if name.startswith(UNET)
            }
        return model

    def _write(self, source: Source, home: Path) -> object:
        model = ldm_model(source)
        path = home / "model.safetensors"
        match source.form:
            case "file" | "opened":
                _save(model, path, source)
                return blockmerge.open_checkpoint(path) if source.form == "opened" else path
            case "memory":
                return model
            case "zip" | "legacy":
                path = home / "model.ckpt"
                # An order of its own, which safetensors files cannot have.
                backwards = dict(reversed(model.items()))
                new = source.form == "zip"
                backwards = backwards if new else _in_this_order(backwards)
                torch.save({"epoch": 1, "state_dict": backwards}, path, _use_new_zipfile_serialization=new)
                return path
            case "unet":
                unet = {
                    name.removeprefix(UNET): tensor for name, tensor in model.items() if name.startswith(UNET)
                }
                _save(unet, path, source)
                return path
            case "vae":
                save_file(
                    {
                        name.removeprefix(VAE): tensor
                        for name, tensor in model.items()
                        if name.startswith(VAE)
                    },
                    path,
                )
                return path
            case "vae-pt":
                vae = {
                    name.removeprefix(VAE): tensor for name, tensor in model.items() if name.startswith(VAE)
                }
                torch.save({"state_dict": {**vae, "loss.logvar": torch.zeros(())}}, home / "model.vae.pt")
                return home / "model.vae.pt"
        folder = home / "folder"
        if "full" in source.extras:
            blockmerge.convert(model, folder, naming="diffusers", threads=1)
        else:
            _write_folder(model, folder, source)
        return _as_form(folder, source)


def _write_folder(model: dict[str, torch.Tensor], folder: Path, source: Source) -> None:
    """A part of a model as a folder, tensors in order, with configs that no conversion would make for it."""
    name = f"{source.family}-{source.channels}{'-vae' if source.form == 'vae-folder' else ''}"
    for path, text in json.loads(FOLDERS.read_text())[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    components: dict[str, dict[str, torch.Tensor]] = {}
    origins = FAMILIES[source.family].origins(model, "ldm", "diffusers")
    # What is turned comes last, as in a folder that is converted.
    for place, tensor in sorted(
        in_diffusers(model, source.family).items(), key=lambda item: origins[item[0]].transposed
    ):
        component, _, own = place.partition("/")
        components.setdefault(component, {})[own] = tensor
    for component, tensors in components.items():
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        (folder / component / f"{stem}.safetensors").write_bytes(_in_order(tensors))


def _in_order(tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file whose tensors lie in the order given; the widest first where that suits no reader."""
    order = list(tensors.items())
    starts = accumulate((tensor.nbytes for _, tensor in order), initial=0)
    if any(start % tensor.itemsize for start, (_, tensor) in zip(starts, order, strict=False)):
        order.sort(key=lambda named: -named[1].itemsize)
    infos, offset = {}, 0
    for name, tensor in order:
        infos[name] = TensorInfo(_SPELLED[tensor.dtype], tuple(tensor.shape), offset)
        offset += tensor.nbytes
    raw = (tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for _, tensor in order)
    return encode_header(infos, {"format": "pt"}, 8) + b"".join(raw)


def _as_form(folder: Path, source: Source) -> Path:
    """A new folder, as one of the forms that is made from one; the path to give."""
    if "carried" in source.extras:
        _carry(folder)
    if "old-names" in source.extras:
        _rename_as_of_old(folder)
    files = sorted(folder.glob("*/*.safetensors"))
    match source.form:
        case "unet-folder" | "vae-folder":
            return folder / source.form.removesuffix("-folder")
        case "diffusers-unet":
            shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet.safetensors")
            return folder / "unet.safetensors"
        case "bin":
            for file in files:
                stem = "pytorch_model" if file.stem == "model" else file.stem
                torch.save(load_file(file), file.with_name(f"{stem}.bin"))
                file.unlink()
        case "fp16-variant":
            for file in files:
                halves = {n: t.half() if t.is_floating_point() else t for n, t in load_file(file).items()}
                save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        case "shards":
            for file in files:
                _shard(file)
    return folder


def _save(model: dict[str, torch.Tensor], path: Path, source: Source) -> None:
    """Write a file; if "noted", with METADATA in its order, which safetensors would leave to chance."""
    save_file(model, path, {"format": "pt"})
    if "noted" in source.extras:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps({**json.loads(data[8:start]), "__metadata__": METADATA}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])


def _in_this_order(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, in storages that torch's legacy format writes in this order: it sorts by their addresses."""
    storages = sorted((torch.UntypedStorage(0) for _ in model), key=lambda storage: str(storage._cdata))
    placed = {}
    for (name, tensor), storage in zip(model.items(), storages, strict=True):
        storage.resize_(tensor.nbytes)
        placed[name] = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape).copy_(tensor)
    return placed


def _shard(file: Path) -> None:
    state = load_file(file)
    names = [f"{file.stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: names[crc32(name.encode()) % 2] for name in state}
    for shard in names:
        tensors = {name: tensor for name, tensor in state.items() if weight_map[name] == shard}
        save_file(tensors, file.with_name(shard), {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": weight_map,
    }
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


def _carry(folder: Path) -> None:
    """Put beside the weights what pipelines have: a tokenizer, a component that LDM lacks, a scheduler."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": ["stable_diffusion", "Checker"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("tokenizer", "safety_checker"):
        (folder / name).mkdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    save_file(
        {"concept_embeds": torch.ones(3, 2)},
        folder / "safety_checker" / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "safety_checker" / "config.json").write_text("{}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.0125}))


def _rename_as_of_old(folder: Path) -> None:
    """The VAE's attention as old diffusers wrote it, and text encoders as transformers 5 does."""
    old = {
        "to_q.": "query.",
        "to_k.": "key.",
        "to_v.": "value.",
        "to_out.0.": "proj_attn.",
        "text_model.": "",
    }
    for file in [*folder.glob("vae/*.safetensors"), *folder.glob("text_encoder/*.safetensors")]:
        renamed = {}
        for name, tensor in load_file(file).items():
            found = next((new for new in old if new in name), None)
            renamed[name.replace(found, old[found]) if found else name] = tensor
        save_file(renamed, file, {"format": "pt"})


def _of_folder(folder: Path, separator: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        found.update(
            {f"{file.parent.name}{separator}{name}": tensor for name, tensor in load_file(file).items()}
        )
    return found


# -- the values ----------------------------------------------------------------------------------------------


def ldm_model(source: Source) -> dict[str, torch.Tensor]:
    """The model in LDM names: B, C and D are A plus small differences, and A's own here and there."""
    whole = source.extras and "full" in source.extras
    only_vae = source.form.startswith("vae")
    model = {
        name: _tensor(name, shape, source)
        for name, shape in sorted(_shapes(source.family, bool(whole or only_vae)).items())
        if not only_vae or source.form == "vae-folder" or name.startswith(VAE)
    }
    if only_vae:  # a folder needs a U-Net, of which little is enough
        kept = _shapes(source.family, False)
        model = {name: tensor for name, tensor in model.items() if name.startswith(VAE) or name in kept}
    if source.channels > 4:
        rows, _, *kernel = model[FIRST].shape
        more = _values(f"{source.letter} more channels", (rows, source.channels - 4, *kernel))
        model[FIRST] = torch.cat([model[FIRST], more.to(model[FIRST].dtype)], 1)
    return _with_extras(model, source)


@cache
def _shapes(family: str, full: bool) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in demo_layout(family).items() if full or _KEPT.fullmatch(name)}


def _tensor(name: str, shape: tuple[int, ...], source: Source) -> torch.Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).contiguous()
    chance = crc32(name.encode())
    values = torch.zeros(shape) if chance % 31 == 0 else _values(name, shape)  # methods divide by norms
    if chance % 7:  # the others are the same in all models
        values = values + DIFFERENCES[source.letter] * _values(f"{source.letter} {name}", shape)
    if source.dtype == "mixed":
        return values.to(
            tuple(DTYPES.values())[crc32(f"dtype {source.letter} {name}".encode()) % 3], copy=True
        )
    return values.to(DTYPES[source.dtype], copy=True)


@lru_cache(1 << 14)
def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    # A seed of each name: whatever becomes of the layouts' order, these tensors stay what they are.
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))


def _with_extras(model: dict[str, torch.Tensor], source: Source) -> dict[str, torch.Tensor]:
    for extra in source.extras:
        if extra in _EXTRAS:  # others are of the file, not of its tensors
            model = _EXTRAS[extra](model, source.letter)
    return model


def _is_text(name: str) -> bool:
    return name.startswith(("cond_stage_model.", "conditioner."))


def _ema(model: Model, letter: str) -> Model:
    copies = {n.removeprefix(UNET).replace(".", ""): t / 2 for n, t in model.items() if n.startswith(UNET)}
    counters = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    return model | {f"model_ema.diffusion_model{name}": one for name, one in copies.items()} | counters


def _ema_only(model: Model, letter: str) -> Model:
    return {name: one for name, one in _ema(model, letter).items() if not name.startswith(UNET)}


def _leftovers(model: Model, letter: str) -> Model:
    rest = {
        "betas": torch.linspace(0, 1, 10),
        "optimizer.state": torch.ones(3),
        VAE + "loss.x": torch.ones(2),
    }
    return model | rest


def _markers(model: Model, letter: str) -> Model:
    empty = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    return model | empty | {"edm_vpred.sigma_max": torch.tensor(120.0)}


def _float_ids(model: Model, letter: str) -> Model:
    return model | {n: t.float() for n, t in model.items() if n.endswith("position_ids")}


def _broken_ids(model: Model, letter: str) -> Model:
    return model | {n: t * 1.1 for n, t in model.items() if n.endswith("position_ids")}


def _nai(model: Model, letter: str) -> Model:
    return {name.replace("transformer.text_model.", "transformer."): one for name, one in model.items()}


def _no_vae(model: Model, letter: str) -> Model:
    return {name: one for name, one in model.items() if not name.startswith(VAE)}


def _no_text(model: Model, letter: str) -> Model:
    return {name: one for name, one in model.items() if not _is_text(name)}


def _less_text(model: Model, letter: str) -> Model:
    return {n: t for n, t in model.items() if not _is_text(n) or crc32(f"{letter}{n}".encode()) % 5}


def _ints(model: Model, letter: str) -> Model:
    norm = next(name for name in model if _is_text(name) and "final" in name)
    return model | {norm: (model[norm].float() * 10).to(torch.int32)}


def _nan(model: Model, letter: str) -> Model:
    model[UNET + "input_blocks.1.0.in_layers.2.weight"].view(-1)[5] = torch.nan
    return model


def _depth(model: Model, letter: str) -> Model:
    return model | {"depth_model.model.scale": torch.ones(3)}


Model = dict[str, torch.Tensor]

_EXTRAS: dict[str, Callable[[Model, str], Model]] = {
    "ema": _ema,
    "ema-only": _ema_only,
    "leftovers": _leftovers,
    "markers": _markers,
    "float-ids": _float_ids,
    "broken-ids": _broken_ids,
    "nai": _nai,
    "no-vae": _no_vae,
    "no-text": _no_text,
    "less-text": _less_text,
    "ints": _ints,
    "nan": _nan,
    "depth": _depth,
}
"""What a model may have, or lack, beside the plain one's tensors; the letter tells A from B."""
