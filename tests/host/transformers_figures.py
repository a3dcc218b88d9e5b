"""Run inside ComfyUI's tree by test_encoders.py: what TransformersEncoder makes of folders against what Condition
Encode makes of the same weights as CLIP_VISION and CLIP, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from inside_comfyui import ARGUMENTS, TREE, load_nodes, show

# isort: split
import comfy.clip_vision
import comfy.sd
import comfy.text_encoders.genmo
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

NODES = load_nodes()
from hywu_nodes.hywu_core.encoders.base import Reads  # noqa: E402
from hywu_nodes.hywu_core.encoders.transformers import TransformersEncoder  # noqa: E402
from hywu_nodes.nodes.host.encode.graph import GraphEncoder  # noqa: E402

ROOT = Path(ARGUMENTS[0])
SIZES = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
SEEING = {**SIZES, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2, "num_channels": 3}
#: ComfyUI's DINOv2 is made for pictures of this side, whatever the config says.
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
TEXTS = ["blur", "make all of it darker, " * 30]


def save(name: str, kind: str, options: dict) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of transformers with random weights, and these as the file has them.

    They are rounded to half precision, in which ComfyUI may keep them, and have the names of files that
    people have, which transformers 5 reads but no longer writes.
    """
    config = f"{kind.replace('Encoder', '').removesuffix('Model')}Config"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).mul(0.3).half().float()
    model.save_pretrained(ROOT / name)
    file = ROOT / name / "model.safetensors"
    prefix = next((new for old, new in PREFIXES.items() if kind.startswith(old)), "")
    weights = load_file(file)
    weights = {prefix + key.removeprefix(prefix): value for key, value in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    return ROOT / name, weights


def compare(part: str, folder: Path, **more) -> dict[str, object]:
    """Largest differences between ComfyUI's condition and ours, and what must be told of them."""
    padding = more.pop("text_padding", 0)
    encoder = TransformersEncoder({part: 16}, folder, folder, text_padding=padding)
    with torch.no_grad():
        graph = GraphEncoder(Reads({part: 16}, {}), more)
        theirs, several = graph(images, TEXTS), graph(images, TEXTS, second, third)
    ours = encoder(images, TEXTS)
    found = {"images": [several.origin["images"]]}
    if part == "vision":
        ours_several = encoder(images, TEXTS, second, third)
        one, two = several.parts[part], ours_several.parts[part]
        found["images"].append(ours_several.origin["images"])
        found["several_shapes"] = [list(one.shape), list(two.shape)]
        found["several_gap"] = float((one - two).abs().max() / one.abs().max())
        length = theirs.parts[part].shape[1]
        found["first_same"] = torch.equal(one[:, :length], theirs.parts[part])
    one, two = theirs.parts[part], ours.parts[part]
    if part in ours.masks:
        one, two = one[theirs.masks[part]], two[ours.masks[part]]
    return found | {
        "shapes": [list(one.shape), list(two.shape)],
        "gap": float((one - two).abs().max() / one.abs().max()),
        "varies": float((one - one.flip(0)).abs().max() / one.abs().max()),
        "origins": [theirs.origin["encoder"], ours.origin["encoder"]],
    }


def vision(name: str, kind: str, options: dict) -> dict[str, object]:
    folder, weights = save(name, kind, options)
    config = ROOT / f"{name}.json"
    said = json.loads((folder / "config.json").read_text())
    config.write_text(json.dumps({**said, **PIXELS.get(name, {}), "projection_dim": 16}))
    made = comfy.clip_vision.ClipVisionModel(str(config))
    missing, _ = made.load_sd(weights)
    assert missing in ([], ["visual_projection.weight"]), missing
    return compare("vision", folder, clip_vision=made)


def clip(name: str, layers: int) -> dict[str, object]:
    """By the function that CLIPLoader calls, which tells CLIP-L, H and G apart by their layers."""
    folder, weights = save(name, "CLIPTextModel", {**READING, "num_hidden_layers": layers})
    shutil.copytree(f"{TREE}/comfy/sd1_tokenizer", folder, dirs_exist_ok=True)
    config = {**READING, "num_hidden_layers": layers}
    sizes = {"model_config": config, f"{name}_model_config": config}
    made = comfy.sd.load_text_encoder_state_dicts([weights], model_options=sizes)
    return compare("text", folder, clip=made)


def umt5() -> dict[str, object]:
    """As Wan's CLIP, whose file also has the tokenizer."""
    folder, weights = save("umt5", "UMT5EncoderModel", T5)
    sentences = [f"make {a} {b}" for a in ("all", "some", "more") for b in TEXTS[1].split(", ")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    words = torch.frombuffer(bytearray((folder / "spiece.model").read_bytes()), dtype=torch.uint8)
    target = SimpleNamespace(
        params={}, clip=comfy.text_encoders.wan.te(), tokenizer=comfy.text_encoders.wan.WanT5Tokenizer
    )  # fmt: skip
    options = {"umt5xxl_model_config": {**T5, "model_type": "umt5"}}
    made = comfy.sd.CLIP(target, tokenizer_data={"spiece_model": words}, model_options=options)
    missing, _ = made.load_sd(weights)
    assert not [key for key in missing if "logit_scale" not in key], missing
    return compare("text", folder, clip=made)


def t5(name: str, target: SimpleNamespace, padding: int) -> dict[str, object]:
    folder, weights = save(name, "T5EncoderModel", T5)
    shutil.copytree(f"{TREE}/comfy/text_encoders/t5_tokenizer", folder, dirs_exist_ok=True)
    options = {"t5xxl_model_config": {**T5, "model_type": "t5"}}
    made = comfy.sd.CLIP(target, model_options=options)
    missing, _ = made.load_sd(weights)
    assert not [key for key in missing if "logit_scale" not in key], missing
    return compare("text", folder, clip=made, text_padding=padding)


# neither a square nor of the models' sides
images = torch.rand(2, 3, 61, 90, generator=torch.Generator().manual_seed(1))
# the items' further pictures, of other sizes: one for each and one for all
second = torch.rand(2, 3, 40, 33, generator=torch.Generator().manual_seed(2))
third = torch.rand(1, 3, 28, 95, generator=torch.Generator().manual_seed(3))
mochi = SimpleNamespace(
    params={}, clip=comfy.text_encoders.genmo.mochi_te(),
    tokenizer=comfy.text_encoders.genmo.MochiT5Tokenizer,
)  # fmt: skip
sd3 = SimpleNamespace(
    params={}, tokenizer=comfy.text_encoders.sd3_clip.SD3Tokenizer,
    clip=comfy.text_encoders.sd3_clip.sd3_clip(clip_l=False, clip_g=False, t5=True),
)  # fmt: skip
show(
    {
        "clip_vision": vision("clip_vision", "CLIPVisionModel", SEEING),
        "siglip": vision("siglip", "SiglipVisionModel", SEEING),
        "dinov2": vision("dinov2", "Dinov2Model", DINO),
        "clip_l": clip("clip_l", 2),
        "clip_h": clip("clip_h", 24),
        "clip_g": clip("clip_g", 32),
        "t5 masked": t5("t5", mochi, 0),
        "umt5": umt5(),
        "t5 padded": t5("t5", sd3, 77),
    }
)
