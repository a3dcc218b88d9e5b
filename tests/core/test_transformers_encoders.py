"""Conditions from local folders of tiny random-weight models of the true architectures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hywu_core import Condition, HYWUError, ParameterGenerator, save_generator
from hywu_core.cli import main
from hywu_core.encoders.transformers import TransformersEncoder
from hywu_core.generator.config import GeneratorConfig
from hywu_core.layout import LoRALayout, Module, Stack

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SEEING = {**SIZES, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}
READING = {
    **SIZES, "vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
#: Name of a folder -> (class, config, its class): what people have, small.
MODELS = {
    "clip": ("CLIPModel", "CLIPConfig", {"vision_config": SEEING, "text_config": {**READING, "num_hidden_layers": 2}}),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", SEEING),
    "clip_vision_projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", SEEING),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SEEING),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SEEING, "mlp_ratio": 2}),
    "clip_l": ("CLIPTextModel", "CLIPTextConfig", {**READING, "num_hidden_layers": 2}),
    "clip_h": ("CLIPTextModel", "CLIPTextConfig", {**READING, "num_hidden_layers": 24}),
    "clip_g": ("CLIPTextModelWithProjection", "CLIPTextConfig", {**READING, "num_hidden_layers": 32}),
    "t5": ("T5EncoderModel", "T5Config", T5),
    "t5_whole": ("T5ForConditionalGeneration", "T5Config", T5),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "bert": ("BertModel", "BertConfig", {**SIZES, "vocab_size": 64, "num_hidden_layers": 1}),
}  # fmt: skip
VISION, TEXT = ("clip", "clip_vision", "siglip", "dinov2"), ("clip", "clip_l", "t5", "umt5")
WORDS = ("make", "it", "darker", "all", "of", "the", "picture", "a", "red", "hat")
SHORT, LONG = "a red hat", "make all of the picture darker"


def save_tokenizer(folder, start: bool) -> None:
    """A tokenizer of a few words; the text ends with </s>, CLIP's also starts with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for number, (name, (kind, config, options)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / name)
        save_tokenizer(root / name, start=name.startswith("clip"))
    return root


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))


def ids(text: str, start: bool = True) -> list[int]:
    return [1] * start + [3 + WORDS.index(word) for word in text.split()] + [2]


# -- what the parts are ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("other", TEXT)
def test_a_batch_item_is_as_alone_and_what_is_masked_does_not_count(folders, images, name, other):
    encoder = TransformersEncoder({"vision": 16, "text": 16}, folders / name, folders / other)
    both = encoder(images, [SHORT, LONG])
    assert both.widths == {"vision": 16, "text": 16}
    assert list(both.masks) == ["text"]
    # 28 pixels in patches of 14, and a class token where the architecture has one
    assert both.parts["vision"].shape[1] == 4 + (name != "siglip")
    assert both.digest() == encoder(images, [SHORT, LONG]).digest()
    for item, text in enumerate((SHORT, LONG)):
        alone = encoder(images[item : item + 1], [text])
        assert torch.equal(alone.parts["vision"][0], both.parts["vision"][item])
        counted = both.parts["text"][item][both.masks["text"][item]]
        assert torch.equal(alone.parts["text"][0][alone.masks["text"][0]], counted)
    assert not torch.equal(both.parts["vision"][0], both.parts["vision"][1])
    assert dict(both.origin)["encoder"] == "comfyui"


def test_a_short_t5_text_beside_a_long_one_is_masked(folders, images):
    encoder = TransformersEncoder({"text": 16}, text_model=folders / "t5")
    mask = encoder(images, [SHORT, LONG]).masks["text"]
    assert mask.sum(dim=1).tolist() == [4, 7]
    padded = TransformersEncoder({"text": 16}, text_model=folders / "t5", text_padding=9)
    assert padded(images, [SHORT, LONG]).masks["text"].sum(dim=1).tolist() == [9, 9]


def test_umt5_is_filled_with_zeros_that_count(folders, images):
    made = TransformersEncoder({"text": 16}, text_model=folders / "umt5")(images[:1], [SHORT])
    assert made.parts["text"].shape == (1, 512, 16)
    assert bool(made.masks["text"].all())
    assert made.parts["text"][0].any(dim=1).sum() == 4


@pytest.mark.parametrize(("name", "pad"), [("clip_l", 2), ("clip_h", 0), ("clip_g", 0)])
def test_a_clip_reads_windows_of_which_all_counts(folders, images, name, pad):
    encoder = TransformersEncoder({"text": 16}, text_model=folders / name)
    made = encoder(images, [SHORT, f"{LONG} {LONG}"])  # 12 words in windows of 10
    assert made.masks["text"].sum(dim=1).tolist() == [12, 24]
    model = transformers.CLIPTextModel.from_pretrained(folders / name)
    rows = torch.tensor([ids(SHORT) + [pad] * 7])
    with torch.no_grad():
        out = model(input_ids=rows, output_hidden_states=True)
    expected = {
        "clip_l": lambda: out.last_hidden_state,
        "clip_h": lambda: getattr(model, "text_model", model).final_layer_norm(
            out.hidden_states[-2]
        ),
        "clip_g": lambda: out.hidden_states[-2],
    }[name]()
    torch.testing.assert_close(made.parts["text"][:1, :12], expected)


def test_a_clip_h_without_its_unused_layer_is_the_same(folders, images, tmp_path):
    """As in the text encoders of Stable Diffusion 2."""
    shorter = copy(folders / "clip_h", tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 23}))
    tensors = load_file(shorter / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.23." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, shorter / "model.safetensors", metadata={"format": "pt"})
    one, two = (
        TransformersEncoder({"text": 16}, text_model=folder)(images[:1], [SHORT])
        for folder in (folders / "clip_h", shorter)
    )
    assert torch.equal(one.parts["text"], two.parts["text"])


def test_weights_are_found_in_the_folders_of_larger_models(folders, images):
    """A whole CLIP, a CLIP with its projection, a T5 with its decoder."""
    for part, name, kind in (
        ("vision", "clip", "CLIPVisionModel"),
        ("vision", "clip_vision_projection", "CLIPVisionModel"),
        ("text", "clip", "CLIPTextModel"),
        ("text", "t5_whole", "T5EncoderModel"),
    ):
        made = TransformersEncoder({part: 16}, folders / name, folders / name)(images[:1], [SHORT])
        stored = load_file(folders / name / "model.safetensors")
        model = getattr(transformers, kind).from_pretrained(folders / name)
        assert all(
            any(torch.equal(value, kept) for kept in stored.values())
            for value in model.parameters()
        )
        assert made.widths == {part: 16}


def test_pixels_of_either_kind_and_of_any_size(folders, images):
    encoder = TransformersEncoder({"vision": 16}, folders / "siglip")
    steps = (images * 255).round().to(torch.uint8)
    as_float = encoder(steps.float() / 255, ["", ""])
    assert encoder(steps, ["", ""]).digest() == as_float.digest()
    assert encoder(steps, ["", ""]).fingerprint == as_float.fingerprint
    sizes = [torch.rand(3, 28, 28), torch.rand(3, 10, 90)]
    assert encoder(sizes, ["", ""]).batch_size == 2
    # a square of the model's size is taken as it is, with the mean and deviation of the family
    model = transformers.SiglipVisionModel.from_pretrained(folders / "siglip")
    square = (sizes[0][None] * 255).round() / 255
    with torch.no_grad():
        expected = model(pixel_values=(square - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(encoder(sizes[:1], [""]).parts["vision"], expected)


@pytest.mark.parametrize("name", VISION)
def test_several_images_of_an_item_follow_one_another(folders, images, name):
    encoder = TransformersEncoder({"vision": 16, "text": 16}, folders / name, folders / "t5")
    second = [torch.rand(3, 28, 28), torch.rand(3, 10, 90)]
    third = torch.rand(1, 3, 50, 20)
    made, alone = encoder(images, [SHORT, LONG], second, third), encoder(images, [SHORT, LONG])
    expected = [encoder(row, [""] * 2).parts["vision"] for row in (images, second, [third[0]] * 2)]
    assert torch.equal(made.parts["vision"], torch.cat(expected, dim=1))
    assert torch.equal(made.parts["text"], alone.parts["text"])
    assert (made.origin["images"], "images" in alone.origin) == (3, False)
    others = [alone, encoder(images, [SHORT, LONG], second), encoder(images, [SHORT, LONG], third)]
    others.append(encoder(images, [SHORT, LONG], third, second))
    assert len({made.fingerprint, *(other.fingerprint for other in others)}) == 5
    with pytest.raises(HYWUError, match="image3 has 3 images for 2 images; give one for all"):
        encoder(images, [SHORT, LONG], second, torch.rand(3, 3, 8, 8))


def test_mean_and_deviation_of_the_folder_count(folders, images, tmp_path):
    folder = copy(folders / "siglip", tmp_path / "siglip")
    processor = transformers.SiglipImageProcessor(image_mean=[0.1] * 3, image_std=[0.9] * 3)
    processor.save_pretrained(folder)
    plain, own = (
        TransformersEncoder({"vision": 16}, f)(images[:1], [""]) for f in (folders / "siglip", folder)
    )  # fmt: skip
    assert not torch.allclose(plain.parts["vision"], own.parts["vision"])


def test_the_fingerprint_is_of_what_is_in_it(folders, images, tmp_path):
    def made(folder, images=images[:1], text=SHORT, **options):
        return TransformersEncoder({"text": 16}, None, folder, **options)(
            images, [text]
        ).fingerprint

    same = made(folders / "t5")
    moved = copy(folders / "t5", tmp_path / "elsewhere")
    assert made(moved) == same
    others = {
        made(moved, images[1:]), made(moved, text=LONG), made(moved, text_padding=20),
        made(folders / "t5_whole"),
    }  # fmt: skip
    tensors = load_file(moved / "model.safetensors")
    tensors["shared.weight"][3, 3] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    others.add(made(moved))
    assert len(others - {same}) == 5


# -- errors ---------------------------------------------------------------------------------------


def copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def without(pattern: str):
    def change(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return change


def pickled(folder):
    without("*.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def incomplete(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(max(tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran')")


def small_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if tensors[name].shape[:1] == (64,)]:
        tensors[name] = tensors[name][:4].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder):
    save_tokenizer(folder, start=False)


def odd_processor(folder):
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')


@pytest.mark.parametrize(
    ("part", "name", "change", "words"),
    [
        ("vision", "clip", without("*"), "holds no config.json; give a transformers model's folder"),
        ("vision", "siglip", without("*.safetensors"), "read from .safetensors files and there are n"),
        ("vision", "siglip", pickled, r"only pickles \(pytorch_model.bin\), which may run code"),
        ("vision", "bert", None, r"is a bert, which is no vision model that runs here \(here run: cli"),
        ("vision", "t5", None, "is a t5, which is no vision model"),
        ("text", "siglip", None, "is a siglip_vision_model, which is no text model"),
        ("text", "t5", without("tokenizer.json"), "holds no tokenizer"),
        ("text", "clip_l", small_vocabulary, "its tokenizer knows more words than the model"),
        ("text", "clip_l", other_tokenizer, "doesn't put a start and an end around a text"),
        ("vision", "siglip", odd_processor, "json: no mean and deviation of three colours"),
        ("vision", "dinov2", cut, "no Dinov2Model that transformers loads"),
        ("vision", "clip_vision", incomplete, "its weights lack "),
        ("vision", "siglip", own_code, "no model that transformers knows"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(folders, images, tmp_path, part, name, change, words):
    folder = copy(folders / name, tmp_path / name)
    if change:
        change(folder)
    with pytest.raises(HYWUError, match=words) as error:
        TransformersEncoder({part: 16}, folder, folder)(images[:1], [LONG])
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_asked_for_must_be_there(folders, images, monkeypatch):
    with pytest.raises(HYWUError, match=r"part 'text' \(16 wide\); give the folder of its text"):
        TransformersEncoder({"text": 16}, folders / "clip")
    with pytest.raises(HYWUError, match="'model', which no vision or text encoder makes"):
        TransformersEncoder({"model": 16}, folders / "clip")
    with pytest.raises(HYWUError, match="gives tokens 16 wide, the generator reads 'vision' 768"):
        TransformersEncoder({"vision": 768}, folders / "clip")
    encoder = TransformersEncoder({"vision": 16}, folders / "clip")
    with pytest.raises(HYWUError, match="2 images and 1 instructions"):
        encoder(images, [SHORT])
    with pytest.raises(HYWUError, match=r"torch.int64 \(3, 40, 30\); it must be"):
        encoder((images * 255).long(), [SHORT, LONG])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HYWUError, match="transformers is needed for encoders from local folders"):
        TransformersEncoder({"vision": 16}, folders / "clip")


# -- the command ----------------------------------------------------------------------------------


def checkpoint(folder, parts, **encoder):
    layout = LoRALayout((Stack(("blocks.0", "blocks.1"), (Module("fc", 8, 8),)),), 2, 2.0)
    made = ParameterGenerator(GeneratorConfig(layout, parts, 8, 2, 32, 16, 1, encoder=encoder))
    made.reset_parameters()
    return save_generator(made, folder / "generator.safetensors", overwrite=True)


def test_a_second_image_is_one_for_all_items_or_one_for_each(folders, tmp_path, capsys, caplog):
    made = checkpoint(tmp_path, {"vision": 16}, type="comfyui", images=2)
    images = [str(tmp_path / f"{name}.png") for name in ("red", "blue", "green")]
    for path, size in zip(images, ((50, 40), (70, 90), (28, 28)), strict=True):
        Image.new("RGB", size, Path(path).stem).save(path)
    args = ["condition", "--checkpoint", str(made), "--vision-model", str(folders / "siglip")]
    args += ["--instruction", SHORT, "--image", *images[:2]]
    out = tmp_path / "two.safetensors"
    assert main([*args, "--image", images[2], "--out", str(out)]) == 0
    assert "batch 2; tokens x width: vision 8 x 16" in capsys.readouterr().out
    assert not caplog.records
    tokens = Condition.load(out).parts["vision"]
    assert torch.equal(tokens[0, 4:], tokens[1, 4:])
    assert not torch.equal(tokens[0, :4], tokens[1, :4])
    one = tmp_path / "one.safetensors"
    assert main([*args, "--out", str(one)]) == 0
    assert torch.equal(Condition.load(one).parts["vision"], tokens[:, :4])
    assert "trained with 2 images per item, here is 1" in caplog.text
    assert main([*args, "--image", *images, "--out", str(tmp_path / "no.safetensors")]) == 1
    assert "--image number 2 has 3 images for 2 images" in capsys.readouterr().err


def test_from_images_to_a_lora(folders, tmp_path, capsys):
    made = checkpoint(tmp_path, {"text": 16, "vision": 16}, type="comfyui")
    images = [str(tmp_path / name) for name in ("a.png", "b.png")]
    Image.new("RGB", (50, 40), "red").save(images[0])
    Image.new("RGB", (700, 900), "blue").save(images[1])
    out = tmp_path / "condition.safetensors"
    args = ["condition", "--checkpoint", str(made), "--image", *images, "--out", str(out)]
    args += ["--vision-model", str(folders / "siglip"), "--text-model", str(folders / "clip_l")]
    assert main([*args, "--instruction", SHORT]) == 0
    assert "batch 2; tokens x width: text 12 x 16, vision 4 x 16" in capsys.readouterr().out
    condition = Condition.load(out)
    assert list(condition.parts) == ["text", "vision"]
    assert condition.origin["instruction"] == [SHORT, SHORT]
    lora = ["--condition", str(out), "--out", str(tmp_path / "lora")]
    assert main(["generate", "--checkpoint", str(made), *lora]) == 0
    capsys.readouterr()
    for options, words in (
        (["--instruction", SHORT], "exists already"),
        (["--instruction", SHORT, SHORT, SHORT, "--overwrite"], "3 instructions for 2 images"),
        (["--instruction", " ", "--overwrite"], "An instruction is empty"),
    ):
        assert main([*args, *options]) == 1
        assert words in capsys.readouterr().err
    checkpoint(tmp_path, {"text": 16, "vision": 16}, type="bundled_editor")
    assert main([*args, "--instruction", SHORT, "--overwrite"]) == 1
    assert "leave --vision-model and --text-model out" in capsys.readouterr().err
    checkpoint(tmp_path, {"text": 16, "vision": 16}, type="another")
    assert main([*args, "--instruction", SHORT, "--overwrite"]) == 1
    assert "come from the encoder 'another'" in capsys.readouterr().err
