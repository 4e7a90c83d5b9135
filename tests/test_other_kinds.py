"""What is no model that can be merged is called what it is: by every command, in the same words, in one line."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from blockmerge import BlockmergeError, UnknownFamilyError
from blockmerge.anatomy import canonical_name, identify
from blockmerge.cli.main import run
from tests.effort import some
from tests.refusals import assert_refused, snapshot
from tests.small_models import small_model

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

NAMES = {
    # LoRAs and their relatives, in the spellings of those that write them
    "LoRA, kohya": ([f"{KOHYA}.alpha", f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"], "is a LoRA (kohya"),
    "LoRA of a text encoder": (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "is a LoRA (kohya"),
    "LoRA, LDM names": (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "is a LoRA (kohya"),
    "LoRA of Flux": (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "is a LoRA (kohya"),
    "LoRA, ComfyUI": (["diffusion_model.input_blocks.1.1.proj_in.lora_up.weight"], "is a LoRA (kohya"),
    "LoCon, Tucker": (["lora_unet_input_blocks_1_0_in_layers_2.lora_mid.weight"], "is a LoRA"),
    "LoRA, PEFT": ([f"{UNET}.lora_A.weight", f"{UNET}.lora_B.weight"], "is a LoRA (PEFT"),
    "LoRA, PEFT's own": ([f"base_model.model.{UNET}.lora_A.default.weight"], "is a LoRA (PEFT"),
    "LoRA, diffusers": ([f"{UNET}.lora.down.weight"], "is a LoRA (diffusers"),
    "LoRA, before PEFT": ([UNET.replace("to_q", "processor.to_q_lora.down.weight")], "is a LoRA (diffusers"),
    "LoRA, linear layer": (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"], "is a LoRA"),
    "LoHa": ([f"{KOHYA}.hada_w1_a", f"{KOHYA}.hada_w1_b", f"{KOHYA}.hada_w2_a"], "is a LoRA (LoHa"),
    "LoKr": ([f"lycoris_{KOHYA[10:]}.lokr_w1", f"lycoris_{KOHYA[10:]}.lokr_w2_a"], "is a LoRA (LoKr"),
    "DoRA": ([f"{KOHYA}.dora_scale", f"{KOHYA}.lora_up.weight"], "is a LoRA (DoRA"),
    "IA3": ([f"{KOHYA}.on_input", f"{KOHYA}.weight"], "is a LoRA (IA3"),
    "GLoRA": ([f"{KOHYA}.a1.weight", f"{KOHYA}.b1.weight", f"{KOHYA}.a2.weight"], "is a LoRA (GLoRA"),
    "OFT": (["oft_unet_input_blocks_4_1_proj_in.oft_blocks"], "is a LoRA (OFT"),
    "full": ([f"{KOHYA}.diff", f"{KOHYA}.diff_b"], "is a LoRA (of whole differences"),
    # what else is used beside a model
    "textual inversion": (["emb_params"], "is a textual inversion"),
    "textual inversion for two encoders": (["clip_g", "clip_l"], "is a textual inversion"),
    "textual inversion, diffusers": (["<cat-toy>", "<cat-toy>_1"], "is a textual inversion"),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter"),
    "ControlNet, LDM": (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "is a ControlNet"),
    "ControlNet, diffusers": (
        ["conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight", "down_blocks.3.resnets.0.conv1.weight",
         "mid_block.resnets.0.conv1.weight", "controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"],
        "is a ControlNet",
    ),
    "ControlNet of Flux": (["controlnet_x_embedder.weight", "transformer_blocks.0.attn.norm_added_q.weight", "single_transformer_blocks.0.attn.to_q.weight"], "is a ControlNet"),
    "ControlNet-LLLite": (["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"], "is a ControlNet"),
    "Control-LoRA": (["lora_controlnet", "input_blocks.1.0.in_layers.2.up", "zero_convs.0.0.weight"], "is a Control-LoRA"),
    "T2I-adapter": (["body.0.block1.weight", "conv_in.weight", "body.0.in_conv.weight"], "is a T2I-adapter"),
    "motion module": (["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"], "is a motion module"),
    # families
    "SD3": (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"], "holds no whole Stable Diffusion 3 medium transformer: it lacks "),
    "SD3.5": (["joint_blocks.0.x_block.attn.ln_q.weight", "joint_blocks.0.context_block.attn.qkv.weight"], "holds no whole Stable Diffusion 3.5 large transformer"),
    "Flux.1": (["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight", "img_in.weight"], "holds no whole Chroma or Flux.1 transformer: it lacks "),
    "Flux.1, all in one": (
        ["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "vae.decoder.conv_in.weight",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
        "holds no whole Chroma or Flux.1 transformer: it lacks ",
    ),
    "Flux.2": (["double_blocks.0.img_attn.norm.key_norm.scale", "double_stream_modulation_img.lin.weight"], "is Flux.2"),
    "Chroma": (["double_blocks.0.img_attn.norm.key_norm.scale", "distilled_guidance_layer.in_proj.weight"], "holds no whole Chroma transformer"),
    "HunyuanVideo": (["model.model.txt_in.individual_token_refiner.blocks.0.norm1.weight", "model.model.double_blocks.0.img_attn.qkv.weight"], "is HunyuanVideo"),
    "AuraFlow": (["model.double_layers.0.attn.w1q.weight"], "is AuraFlow"),
    "Wan": (["head.modulation", "blocks.0.self_attn.q.weight", "time_embedding.0.weight"], "is Wan"),
    "Lumina 2": (["cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"], "holds no whole Lumina 2 or Z-Image transformer"),
    "Z-Image": (["cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight", "cap_pad_token"], "holds no whole Z-Image transformer"),
    "Qwen-Image": (["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"], "is Qwen-Image"),
    "Anima": (["net.blocks.0.mlp.layer1.weight", "net.llm_adapter.blocks.0.cross_attn.q_proj.weight"], "holds no whole Anima transformer"),
    "Cosmos": (["net.blocks.0.mlp.layer1.weight"], "holds no whole Anima or Cosmos-Predict2 transformer"),
    "Krea 2": (["txtfusion.projector.weight"], "is Krea 2"),
    "HunyuanDiT": (["mlp_t5.0.weight"], "is HunyuanDiT"),
    "PixArt": (["t_block.1.weight", "blocks.0.attn.qkv.weight"], "is PixArt"),
    "LTX-Video": (["adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"], "is LTX-Video"),
    "Stable Cascade": (["clf.1.weight", "clip_txt_mapper.weight"], "is Stable Cascade"),
    "HiDream": (["caption_projection.0.linear.weight"], "is HiDream"),
    # parts
    "CLIP text encoder": (["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"], "is a text encoder alone"),
    "CLIP, transformers 5": (["embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"], "is a text encoder (CLIP)"),
    "CLIP, both": (["text_model.final_layer_norm.weight", "vision_model.embeddings.class_embedding"], "is a CLIP (text and vision)"),
    "CLIP vision": (["vision_model.embeddings.class_embedding"], "is a vision encoder"),
    "OpenCLIP": (["transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"], "is a text encoder (OpenCLIP)"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "is a text encoder (T5)"),
    "TAESD": (["1.weight", "3.conv.0.weight", "3.conv.2.weight"], "is a tiny VAE (TAESD)"),
    "TAESD, diffusers": (["decoder.layers.0.weight", "decoder.layers.2.conv.0.weight"], "is a tiny VAE (TAESD)"),
    "VAE of Wan": (["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"], "is a VAE of another family"),
    # other models
    "ESRGAN, old": (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "is an upscaler"),
    "ESRGAN": (["conv_first.weight", "body.0.rdb1.conv1.weight"], "is an upscaler"),
    "Real-ESRGAN": (["body.0.weight", "body.0.bias", "body.1.weight", "body.2.weight"], "is an upscaler"),
    "Llama": (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "is a language model"),
    "GPT-2": (["transformer.h.0.attn.c_attn.weight"], "is a language model"),
    "BERT": (["bert.encoder.layer.0.attention.self.query.weight"], "is a language model"),
}  # fmt: skip
"""What files of tensors are: a few real names of each, and what is said."""

TOKENS = {"*": torch.ones(4, 768)}
TORCH_FILES = {
    "textual inversion.pt": ({"string_to_token": {"*": 265}, "string_to_param": TOKENS, "name": "x"}, "is a textual inversion"),
    "learned_embeds.bin": ({"sks": torch.ones(768)}, "is a textual inversion"),
    "hypernetwork.pt": ({"step": 3, 768: ({"linear.0.weight": torch.ones(8, 4)}, {"linear.0.weight": torch.ones(8, 4)})}, "is a hypernetwork"),
    "ip-adapter.bin": ({"image_proj": {"proj.weight": torch.ones(2, 2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}, "is an IP-Adapter"),
    "RealESRGAN.pth": ({"params_ema": {"conv_first.weight": torch.ones(2, 2)}}, "is an upscaler"),
    "ESRGAN.pth": ({"model.0.weight": torch.ones(2), "model.1.sub.0.RDB1.conv1.0.weight": torch.ones(2)}, "is an upscaler"),
    "lora.pt": ({f"{KOHYA}.lora_down.weight": torch.ones(2, 2)}, "is a LoRA"),
}  # fmt: skip


def _zip(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 100)
    return buffer.getvalue()


WEIGHT_MAP = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
FILES = {
    "empty.safetensors": (b"", "is empty"),
    "login.safetensors": (b"Invalid username or password.", '"Invalid username or password."'),
    "denied.safetensors": (b"Access to model x is restricted\n", 'is a text, not a model, and says "Access to model'),
    "utf-16.safetensors": ("Zugriff verweigert: größer".encode("utf-16"), "Zugriff verweigert: größer"),
    "blank.ckpt": (b" \n\n", "is a blank text"),
    "cut letter.safetensors": ("ö".encode() * 4000, "is a text, not a model"),
    "json.safetensors": (b'{"error": "Unauthorized", "code": 401}', 'is a JSON text, not a model, and says "Unauthorized"'),
    "list.json": (WEIGHT_MAP, "is the list of a model's shards"),
    "model_index.json": (b'{"_class_name": "X", "_diffusers_version": "0.30.0"}', "is a config of diffusers"),
    "xml.ckpt": (S3, 'is an XML text, not a model, and says "Access Denied"'),
    "page.safetensors": (b"\n<!-- x -->\n<HTML><head><title>Just a moment...</title>", 'is an HTML page, not a model, and says "Just a moment..."'),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-LFS pointer"),
    "q8.gguf": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, which blockmerge cannot read yet"),
    "gguf.safetensors": (b"GGUF\2\0\0\0" + bytes(64), "is a GGUF file"),
    "7z.safetensors": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(64), "is a 7z archive"),
    "rar.ckpt": (b"Rar!\x1a\7\1\0" + bytes(64), "is a RAR archive"),
    "gzip.ckpt": (gzip.compress(b"x" * 100), "is a gzip archive"),
    "zip.safetensors": (_zip("model.safetensors"), "zip archive without one data.pkl, as torch writes it (it holds model.safetensors)"),
    "tar.pt": (b"x" * 100 + b"\0" * 157 + b"ustar\x0000" + bytes(600), "is a tar archive"),
    "png.safetensors": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is a PNG picture"),
    "jpeg.safetensors": (b"\xff\xd8\xff\xe0" + bytes(64), "is a JPEG picture"),
    "setup.safetensors": (b"MZ\x90\0" + bytes(100), "is a program for Windows"),
    "elf.bin": (b"\x7fELF\2\1\1" + bytes(64), "is a program for Linux"),
    "keras.safetensors": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "model.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(64), "is an ONNX or TensorRT model"),
    "flax.safetensors": (b"\x82\xa6params\x81" + bytes(64), "is a Flax model"),
    "._model.safetensors": (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64), "is what macOS keeps beside a file"),
    "nothing.safetensors": (bytes(5000), "is broken off"),
    "nothing.ckpt": (bytes(5000), "is broken off"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two small models."""
    folder = tmp_path_factory.mktemp("good")
    for number, name in enumerate(("a", "b")):
        save_file(small_model(seed=number, for_a_folder=True), folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def refusals(bad, good):
    """Every way to give a file to a command that has to refuse it, without writing anything."""
    a, b = good
    yield bad, a, "-w", "0.5", "-o", "o.safetensors"
    yield a, bad, "-w", "0.5", "-o", "o.safetensors"
    yield a, bad, b, "-m", "add_difference", "-w", "0.5", "-o", "o.safetensors", "--dry-run"
    yield "convert", bad, "o.safetensors"
    yield "convert", bad, "o", "--to", "diffusers"
    yield "convert", a, "o.safetensors", "--vae", bad
    yield "convert", a, "o", "--to", "diffusers", "--configs", bad
    yield "check", bad, "--fix", "o.safetensors"
    yield "similarity", bad, a
    yield "similarity", a, b, "--method", "weights", "--common-base", bad
    yield "explain", bad, a, b
    yield "explain", a, bad


def assert_called_what_it_is(capsys, folder, bad, good, says, opens):
    for arguments in some(refusals(bad, good), of=3, chosen_by=bad.name + says):
        assert_refused(capsys, folder, *arguments, says=[bad.name, says])
    before = snapshot(folder)
    assert run(["similarity", str(good[0]), str(bad), str(good[1]), "--method", "weights", "--json"]) == 1
    errors = [row["error"] for row in json.loads(capsys.readouterr().out)["references"] if row["error"]]
    assert len(errors) == 1
    assert bad.name in errors[0]
    assert says in errors[0]
    if not opens:
        for command in ("inspect", "check"):
            assert_refused(capsys, folder, command, bad, says=[bad.name, says])
    else:
        assert run(["inspect", str(bad), "--json"]) == 0
        assert says in json.loads(capsys.readouterr().out)["why_unknown"]
        code = run(["check", str(bad), "--json"])
        problems = json.loads(capsys.readouterr().out)["problems"]
        (what_it_is,) = (one for one in problems if one["code"] in ("no_unet", "lora"))
        assert bad.name in what_it_is["message"]
        assert code == (what_it_is["code"] == "no_unet")  # a LoRA that can be read is nothing wrong
        assert any(says in one["message"] for one in problems)
    assert snapshot(folder) == before


@pytest.mark.parametrize("case", NAMES)
def test_a_file_of_other_tensors(good, tmp_path, capsys, case):
    names, says = NAMES[case]
    bad = tmp_path / "bad.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, bad)
    assert_called_what_it_is(capsys, tmp_path, bad, good, says, opens=True)


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_torch_file_of_something_else(good, tmp_path, capsys, name):
    saved, says = TORCH_FILES[name]
    torch.save(saved, tmp_path / name)
    assert_called_what_it_is(capsys, tmp_path, tmp_path / name, good, says, opens=True)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_tensors(good, tmp_path, capsys, name):
    data, says = FILES[name]
    (tmp_path / name).write_bytes(data)
    assert_called_what_it_is(capsys, tmp_path, tmp_path / name, good, says, opens=False)


def test_one_shard_of_several(good, tmp_path, capsys):
    """It may hold enough to look like a whole U-Net."""
    bad = tmp_path / "model-00001-of-00003.safetensors"
    save_file(small_model(), bad)
    says = "is one of the 3 shards of a model: give the folder with all of them"
    assert_called_what_it_is(capsys, tmp_path, bad, good, says, opens=True)
    bad.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert blockmerge.inspect(tmp_path / "model-00001-of-00001.safetensors").family == "sd1"


def test_python_says_the_same(good, tmp_path):
    flux = {name: torch.ones(2, 2) for name in NAMES["Flux.1"][0]}
    save_file(flux, tmp_path / "flux.safetensors")
    a, bad = good[0], tmp_path / "flux.safetensors"
    out = tmp_path / "o.safetensors"
    calls = {
        "merge": lambda: blockmerge.merge(a, bad, weights=0.5, output=out),
        "plan": lambda: blockmerge.Merge(a, bad, weights=0.5).plan(out),
        "convert": lambda: blockmerge.convert(bad, out),
        "similarity": lambda: blockmerge.similarity(bad, [a]),
        "explain": lambda: blockmerge.explain(bad, [a]),
        "live": lambda: blockmerge.LiveMerge(torch.nn.Linear(1, 1), bad, a),
    }
    for name, call in calls.items():
        with pytest.raises(
            BlockmergeError, match=r"flux\.safetensors holds no whole Chroma or Flux\.1 transformer"
        ):
            call()
        assert not out.exists(), name
    for second in (flux, {"emb_params": torch.ones(8, 768)}):
        with pytest.raises(
            BlockmergeError,
            match=r"state dict B (holds no whole Chroma or Flux\.1 tr|is a textual inversion)",
        ):
            blockmerge.merge_state_dicts(small_model(), second, weights=0.5)


def test_a_model_with_something_beside_it_is_a_model(good, tmp_path):
    """As files are that hold a ControlNet or an embedding beside the model they are for."""
    beside = ["control_model.zero_convs.0.0.weight", "bundle_emb.x.clip_l", "motion_modules.pe"]
    path = tmp_path / "both.safetensors"
    save_file({**small_model(), **{name: torch.ones(2, 2) for name in beside}}, path)
    assert blockmerge.inspect(path).family == "sd1"


LIBRARY = {
    "diffusers": {
        "ControlNetModel": "is a ControlNet",
        "FluxControlNetModel": "is a ControlNet",
        "SD3ControlNetModel": "is a ControlNet",
        "T2IAdapter": "is a T2I-adapter",
        "MotionAdapter": "is a motion module",
        "AutoencoderTiny": "is a tiny VAE",
        "AutoencoderKLWan": "is a VAE of another family",
        "FluxTransformer2DModel": "= Flux.1",
        "OvisImageTransformer2DModel": "is Bria, LongCat, Motif or Ovis",
        "SD3Transformer2DModel": "= Stable Diffusion 3 medium",
        "AuraFlowTransformer2DModel": "is AuraFlow,",
        "ChromaTransformer2DModel": "= Chroma",
        "WanTransformer3DModel": "is Wan,",
        "QwenImageTransformer2DModel": "is Qwen-Image,",
        "ZImageTransformer2DModel": "= Z-Image",
        "Lumina2Transformer2DModel": "= Lumina 2",
        "PixArtTransformer2DModel": "is PixArt,",
        "SanaTransformer2DModel": "is Sana,",
        "UNetSpatioTemporalConditionModel": "is Stable Video Diffusion,",
        "UNet3DConditionModel": "is a video model",
        "UNetMotionModel": "is AnimateDiff,",
    },
    "transformers": {
        "CLIPModel": "is a CLIP (text and vision)",
        "CLIPTextModel": "is a text encoder",
        "CLIPTextModelWithProjection": "is a text encoder",
        "CLIPVisionModelWithProjection": "is a vision encoder",
        "BertModel": "is a language model",
    },
}
"""Classes whose own names, as the libraries make them, have to be known: what is said, or the family."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", LIBRARY)
def test_what_the_libraries_make_is_known(library):
    home = pytest.importorskip(library)
    for name, says in LIBRARY[library].items():
        made = getattr(home, name)
        with torch.device("meta"):
            module = made() if library == "diffusers" else made(made.config_class())
        shapes = {canonical_name(key): tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for prefix in ("", "transformer/") if "Transformer" in name else ("",):
            named = {prefix + key: shape for key, shape in shapes.items()}
            if says.startswith("= "):
                assert identify(named).family.title == says[2:]
                continue
            with pytest.raises(UnknownFamilyError) as caught:
                identify(named)
            assert str(caught.value).startswith(says), name


CONV, PROJ = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
)
OUT = "model.diffusion_model.out.0.weight"
DAMAGES = {
    "lacks a tensor": lambda t: t.pop(PROJ),
    "lacks its first": lambda t: t.pop(CONV),
    "has one more": lambda t: t.update({OUT + "_more": torch.ones(2)}),
    "another shape": lambda t: t.update({PROJ: torch.zeros(3, 5, 1, 1).half()}),
    "a flat tensor": lambda t: t.update({CONV: t[CONV].flatten()}),
    "a number": lambda t: t.update({OUT: torch.tensor(1.0)}),
    "an empty tensor": lambda t: t.update({OUT: torch.zeros(0)}),
    "integers": lambda t: t.update({OUT: t[OUT].to(torch.int8)}),
    "NaN": lambda t: t.update({OUT: t[OUT] * float("nan")}),
    "another channel": lambda t: t.update({CONV: torch.zeros(t[CONV].shape[0], 7, 3, 3)}),
    "a block too many": lambda t: t.update({"model.diffusion_model.input_blocks.12.0.op.weight": torch.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_error_has_the_name_of_the_file(good, tmp_path, damage):
    tensors = small_model(for_a_folder=True)
    DAMAGES[damage](tensors)
    bad, (a, b), out = tmp_path / "bad.safetensors", good, tmp_path / "o"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, bad)
    calls = (
        lambda: blockmerge.convert(bad, f"{out}.safetensors", overwrite=True, dtype="fp16"),
        lambda: blockmerge.convert(bad, out, naming="diffusers", overwrite=True),
        lambda: blockmerge.merge(bad, a, weights=0.5, output=f"{out}.safetensors", overwrite=True),
        lambda: blockmerge.merge(
            a, bad, b, method="add_difference", weights=0.5, output=f"{out}.safetensors"
        ),
        lambda: blockmerge.convert(a, f"{out}.safetensors", vae=bad, overwrite=True),
        lambda: blockmerge.similarity(bad, [a], "weights"),
        lambda: blockmerge.similarity(bad, [a]),
        lambda: blockmerge.explain(bad, [a, b]),
        lambda: blockmerge.explain(a, [bad]),
        lambda: blockmerge.check(bad),
        lambda: blockmerge.inspect(bad),
    )
    for call in some(calls, of=3, chosen_by=damage):
        (tmp_path / "o.safetensors").unlink(missing_ok=True)
        try:
            call()
        except BlockmergeError as error:
            assert "bad.safetensors" in str(error)
            assert "\n" not in str(error)
