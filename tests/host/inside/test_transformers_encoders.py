"""Encoders from local folders, without ComfyUI, against Condition Encode with the same weights as CLIP_VISION
and CLIP: the same condition, for images that are neither square nor small.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_vision
import comfy.sd
import comfy.text_encoders.genmo
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from hywu_nodes.hywu_core.encoders.base import Reads
from hywu_nodes.hywu_core.encoders.transformers import TransformersEncoder
from hywu_nodes.nodes.host.encode.graph import GraphEncoder
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
SEEING = {**SIZES, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "num_channels": 3}
#: ComfyUI's DINOv2 is made for images of this side, whatever the config says.
DINO = {
    **SEEING,
    "image_size": 518,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
}
#: What ComfyUI's own configs of these say; a CLIP's is its default.
PIXELS = {
    "siglip": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "dinov2": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
READING = {
    **SIZES, "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406,
    "eos_token_id": 49407, "hidden_act": "gelu",
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
}  # fmt: skip
PREFIXES = {"CLIPVision": "vision_model.", "Siglip": "vision_model.", "CLIPText": "text_model."}
COMFY = Path(inspect.getfile(comfy.sd)).parent
# neither a square nor of the models' sides
IMAGES = torch.rand(2, 3, 61, 90, generator=torch.Generator().manual_seed(1))
SECOND = torch.rand(2, 3, 40, 33, generator=torch.Generator().manual_seed(2))
THIRD = torch.rand(1, 3, 28, 95, generator=torch.Generator().manual_seed(3))
TEXTS = ["blur", "make all of it darker, " * 30]


def save(root: Path, kind: str, options: dict) -> dict[str, torch.Tensor]:
    """Fill a folder of transformers with random weights; returns these as the file has them.

    They are rounded to half precision, in which ComfyUI may keep them, and have the names of files that
    people have, which transformers 5 reads but no longer writes.
    """
    config = f"{kind.replace('Encoder', '').removesuffix('Model')}Config"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).mul(0.3).half().float()
    model.save_pretrained(root)
    file = root / "model.safetensors"
    prefix = next((new for old, new in PREFIXES.items() if kind.startswith(old)), "")
    weights = load_file(file)
    weights = {prefix + key.removeprefix(prefix): value for key, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    return weights


def compare(part: str, folder: Path, length: int | None, padding: int = 0, **sockets) -> None:
    """ComfyUI's condition and ours are one: parts, what counts of them, and every value.

    length: tokens of both that count, over both items; None where they vary with the tokenizer.
    """
    encoder = TransformersEncoder({part: 16}, folder, folder, text_padding=padding)
    with torch.no_grad():
        theirs = GraphEncoder(Reads({part: 16}, {}), sockets)(IMAGES, TEXTS)
    ours = encoder(IMAGES, TEXTS)
    one, two = theirs.parts[part], ours.parts[part]
    if part in ours.masks:
        one, two = one[theirs.masks[part]], two[ours.masks[part]]
    assert one.shape == two.shape
    assert length is None or one.shape[:-1].numel() == length
    assert theirs.origin["encoder"] == ours.origin["encoder"] == "comfyui"
    assert far(one, two) < 2e-5
    assert far(one, one.flip(0)) > 0.1


def far(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


def compare_several(folder: Path, length: int, seen: comfy.clip_vision.ClipVisionModel) -> None:
    """The items' further images, of other sizes, follow the first: one per item, and one for all."""
    with torch.no_grad():
        graph = GraphEncoder(Reads({"vision": 16}, {}), {"clip_vision": seen})
        first, theirs = graph(IMAGES, TEXTS), graph(IMAGES, TEXTS, SECOND, THIRD)
    ours = TransformersEncoder({"vision": 16}, folder)(IMAGES, TEXTS, SECOND, THIRD)
    one, two = theirs.parts["vision"], ours.parts["vision"]
    assert one.shape == two.shape == (2, 3 * length, 16)
    assert far(one, two) < 2e-5
    assert torch.equal(one[:, :length], first.parts["vision"])
    assert theirs.origin["images"] == ours.origin["images"] == 3


# -- one test per family -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options", "length"),
    [
        ("clip_vision", "CLIPVisionModel", SEEING, 5),
        ("siglip", "SiglipVisionModel", SEEING, 4),
        ("dinov2", "Dinov2Model", DINO, 1370),
    ],
)
def test_image_encoders(tmp_path, name, kind, options, length):
    folder = tmp_path / name
    weights = save(folder, kind, options)
    config = tmp_path / "config.json"
    said = json.loads((folder / "config.json").read_text())
    config.write_text(json.dumps({**said, **PIXELS.get(name, {}), "projection_dim": 16}))
    made = comfy.clip_vision.ClipVisionModel(str(config))
    missing, _ = made.load_sd(weights)
    assert missing in ([], ["visual_projection.weight"]), missing
    compare("vision", folder, 2 * length, clip_vision=made)
    compare_several(folder, length, made)


@pytest.mark.parametrize(("name", "layers"), [("clip_l", 2), ("clip_h", 24), ("clip_g", 32)])
def test_a_clips_text(tmp_path, name, layers):
    """By the function that CLIPLoader calls, which tells CLIP-L, H and G apart by their layers."""
    config = {**READING, "num_hidden_layers": layers}
    weights = save(tmp_path, "CLIPTextModel", config)
    shutil.copytree(COMFY / "sd1_tokenizer", tmp_path, dirs_exist_ok=True)
    sizes = {"model_config": config, f"{name}_model_config": config}
    made = comfy.sd.load_text_encoder_state_dicts([weights], model_options=sizes)
    # one window of the short text and three of the long one
    compare("text", tmp_path, 4 * 77, clip=made)


def load(target: SimpleNamespace, weights: dict, options: dict, **tokenizer) -> comfy.sd.CLIP:
    made = comfy.sd.CLIP(target, model_options=options, **tokenizer)
    missing, _ = made.load_sd(weights)
    assert not [key for key in missing if "logit_scale" not in key], missing
    return made


def test_umt5(tmp_path):
    """As Wan's CLIP, whose file also has the tokenizer."""
    weights = save(tmp_path, "UMT5EncoderModel", T5)
    sentences = [f"make {a} {b}" for a in ("all", "some", "more") for b in TEXTS[1].split(", ")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    words = torch.frombuffer(bytearray((tmp_path / "spiece.model").read_bytes()), dtype=torch.uint8)
    target = SimpleNamespace(
        params={}, clip=comfy.text_encoders.wan.te(),
        tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
    )  # fmt: skip
    options = {"umt5xxl_model_config": {**T5, "model_type": "umt5"}}
    made = load(target, weights, options, tokenizer_data={"spiece_model": words})
    compare("text", tmp_path, 2 * 512, clip=made)


@pytest.mark.parametrize("padding", [0, 77])
def test_t5(tmp_path, padding):
    """Mochi's masks what fills up its text, Stable Diffusion 3's counts it."""
    genmo, sd3 = comfy.text_encoders.genmo, comfy.text_encoders.sd3_clip
    target = SimpleNamespace(params={}, clip=genmo.mochi_te(), tokenizer=genmo.MochiT5Tokenizer)
    if padding:
        clip = sd3.sd3_clip(clip_l=False, clip_g=False, t5=True)
        target = SimpleNamespace(params={}, clip=clip, tokenizer=sd3.SD3Tokenizer)
    weights = save(tmp_path, "T5EncoderModel", T5)
    shutil.copytree(COMFY / "text_encoders" / "t5_tokenizer", tmp_path, dirs_exist_ok=True)
    made = load(target, weights, {"t5xxl_model_config": {**T5, "model_type": "t5"}})
    compare("text", tmp_path, None, padding, clip=made)
