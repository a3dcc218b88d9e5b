"""What the editor is not trained to do, as people write it: such requests leave the image as it is.

Real words in many sentences, and words without meaning. None tells a conflict pair's phrasing (a test
sees to it), for what those do is the generator's to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_THINGS = """
    hat|cap|crown|pair of glasses|moustache|beard|tie|scarf|coat|red dress|shirt|shoe|umbrella|balloon|
    dog|puppy|cat|kitten|horse|cow|elephant|tiger|lion|bird|parrot|eagle|fish|shark|whale|dragon|unicorn|
    butterfly|bee|rabbit|bear|panda|monkey|dinosaur|robot|alien|astronaut|pirate|wizard|knight|princess|
    child|baby|boy|girl|man|woman|crowd|family|person|face|smile|hand|nose|eye|tree|palm tree|flower|rose|
    garden|forest|mountain|river|lake|beach|island|waterfall|volcano|desert|moon|star|planet|rainbow|cloud|
    storm|snow|rain|fire|smoke ring|house|castle|tower|bridge|church|window|door|roof|street|road|fence|wall|
    car|bus|truck|train|bicycle|boat|ship|plane|helicopter|rocket|table|chair|sofa|bed|lamp post|mirror|
    clock|book|letter|sign|logo|watermark|caption|flag|guitar|piano|drum|ball|toy|cake|pizza|burger|apple|
    banana|orange|bread|cheese|bottle|cup of coffee|glass of wine|plate|spoon|knife|candle|gift|box|bag|
    phone|laptop|camera|television|sword|statue|fountain|pool|swing|tent|campfire|snowman|pumpkin|christmas tree
"""
_PLACES = """
    on the table|in the sky|behind him|next to her|in the corner|on the left|on the right|in the middle|
    at the top|at the bottom|in the background|in front of the house|under the tree|on his head|in her hand|
    by the window|across the street|over the sea|between them|inside the room|in paris|on mars|at the party
"""
_KINDS = """
    red|blue|green|yellow|pink|wooden|golden|silver|tiny|huge|round|square|happy|sad|funny|scary|cute|
    striped|dotted|furry|metal|plastic|glass|beautiful|ugly|famous|flying|sleeping|dancing|running|sitting
"""
_STYLES = """
    a van gogh painting|a comic book|a cartoon|an anime frame|a watercolour|a lego scene|a clay model|
    a stained glass window|a tapestry|a marble statue|a video game|a film scene|a magazine cover|a postcard|
    a passport photo|a renaissance portrait|a cubist work|graffiti|origami|a quilt|a blueprint|a map
"""
_SENTENCES = (
    "add a {thing}", "add a {kind} {thing}", "put a {thing} {place}", "put a {kind} {thing} {place}",
    "remove the {thing}", "remove the {thing} {place}", "delete the {kind} {thing}", "erase the {thing}",
    "replace the {thing} with a {thing}", "swap the {thing} for a {kind} {thing}",
    "turn the {thing} into a {thing}", "make the {thing} {kind}", "make the {thing} bigger",
    "make the {thing} smaller", "move the {thing} {place}", "change the {thing} to a {thing}",
    "change the colour of the {thing} to {kind}", "paint the {thing} {kind}", "give the {thing} a {thing}",
    "let the {thing} look {kind}", "draw a {thing} {place}", "insert a {thing}", "two {thing}s please",
    "i want a {kind} {thing} {place}", "where is the {thing}", "a {thing}", "{thing}", "{kind}",
    "a {kind} {thing} {place}", "as {style}", "in the style of {style}", "turn this into {style}",
    "rotate the {thing}", "crop to the {thing}", "zoom in on the {thing}", "open the {thing}",
    "close the {thing}", "fill the {thing} with water", "write hello on the {thing}", "{thing} {place}",
    "make them dance", "make everyone smile", "what is this", "tell me a joke", "hello",
    "thank you very much", "translate the text", "extend the picture to the left", "flip it upside down",
    "mirror the picture", "make it a square", "count the {thing}s", "show me the {thing} from behind",
    "have the {thing} hold a {thing}", "dress the {thing} as a {thing}", "summer instead of winter",
    "make it night", "a portrait of a {kind} {thing}", "lorem ipsum", "asdf", "ok", "do it again", "go",
    "enhance", "enhance it", "make it better", "improve the photo", "4k hdr masterpiece",
    "colorize it", "zoom out", "make it look like {style}", "a {kind} hat please",
    "make the sky {kind}", "add {thing}s {place}", "a photo of a {kind} {thing}", "beautify",
)  # fmt: skip

_SYLLABLES = (
    "ba", "cor", "du", "el", "fi", "gra", "hu", "ix", "jo", "kem", "lu", "mar", "ni", "ost", "pla",
    "qui", "ro", "sut", "te", "um", "vo", "wen", "xi", "yor", "zab",
)  # fmt: skip


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split("|"))


THINGS, PLACES, KINDS, STYLES = map(_listed, (_THINGS, _PLACES, _KINDS, _STYLES))
#: How many requests are of words without meaning, and of words in any order.
NONSENSE, SHUFFLED = 0.25, 0.15


def unknown_request(generator: torch.Generator) -> str:
    """A request for something that no task here does."""
    kind = float(torch.rand((), generator=generator))
    if kind < NONSENSE:
        return nonsense(generator)
    if kind < NONSENSE + SHUFFLED:
        count = 1 + _pick(range(5), generator)
        lists = (THINGS, PLACES, KINDS, STYLES)
        return " ".join(_pick(_pick(lists, generator), generator) for _ in range(count))
    text = _pick(_SENTENCES, generator)
    for slot, choices in (
        ("{thing}", THINGS), ("{place}", PLACES), ("{kind}", KINDS), ("{style}", STYLES),
    ):  # fmt: skip
        while slot in text:
            text = text.replace(slot, _pick(choices, generator), 1)
    return text


def nonsense(generator: torch.Generator) -> str:
    """One to six words that mean nothing."""
    return " ".join(
        "".join(_pick(_SYLLABLES, generator) for _ in range(1 + _pick(range(3), generator)))
        for _ in range(1 + _pick(range(6), generator))
    )


def _pick(choices: Sequence, generator: torch.Generator):
    return choices[int(torch.randint(len(choices), (), generator=generator))]
