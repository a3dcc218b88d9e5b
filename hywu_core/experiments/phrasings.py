"""How people may ask for the conflict tasks. The last two of each are never trained on.

A task has a dozen sentences of its own and many composed of its words: the more sentences a word stands in,
the less any single one is learned by heart. The held-out ones use words that occur in the trained ones, in
sentences that don't: a text encoder of this size, which has read nothing but such lists, can't know a synonym
that it has never seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

#: Put around a trained phrasing at random: what stands around the words that matter should not.
CARRIERS = (
    "please {}", "{} please", "can you {}", "{} if you can", "now {}", "just {}", "next: {}",
    "{} for me", "{} right away", "{} in this one", "{}, thanks", "hello, {}", "let us {}",
    "try to {}", "we need to {}", "i would like this: {}", "my wish is to {}", "what i need: {}",
    "for the album: {}",
)  # fmt: skip

#: Sentences of its own that each task's list begins with; the others are composed.
WRITTEN = 18

#: How often a trained phrasing gets a carrier.
CARRIED = 0.7

OBJECTS = (
    "the image",
    "the picture",
    "this photo",
    "it",
    "everything",
    "my photograph",
    "the shot",
)

#: Sentences around what a task does, how its result looks, what it brings and what it takes away.
DOES = ("{word} {object}", "could you {word} {object}", "i want to {word} {object}")
LOOKS = (
    "make {object} {word}", "make {object} much {word}", "i want {object} {word}", "{word}",
    "turn {object} {word}", "it has to be {word}", "get {object} {word}", "give me {object} {word}",
)  # fmt: skip
BRINGS = (
    "add {word}", "give {object} {word}", "put {word} into {object}", "{word}", "with {word}",
    "i want {word}", "{object} needs {word}", "we want to see {word}",
)  # fmt: skip
TAKES = (
    "remove {word}", "take {word} out of {object}", "get rid of {word}", "without {word}",
    "lose {word}", "i don't want {word}", "{object} has too much {word}", "no {word}",
    "have {word} removed", "free {object} of {word}",
)  # fmt: skip


def composed(
    does: Sequence[str] = (), looks: Sequence[str] = (), brings: Sequence[str] = (),
    takes: Sequence[str] = (),
) -> tuple[str, ...]:  # fmt: skip
    """Each word in each sentence of its kind, the objects taken in turn; without repetitions."""
    objects, texts = itertools.cycle(OBJECTS), []
    for sentences, words in ((DOES, does), (LOOKS, looks), (BRINGS, brings), (TAKES, takes)):
        for sentence, word in itertools.product(sentences, words):
            texts.append(sentence.format(word=word, object=next(objects)))
    return tuple(dict.fromkeys(texts))


BLUR = (
    "blur the image", "make the picture blurry", "apply a gaussian blur", "soften the focus",
    "put this photo out of focus", "add blur to this", "i want it smoother and blurrier", "blur",
    "please blur this photo", "more blur", "can you make it blurry", "a soft blurred version",
    "make it unsharp", "blur everything a lot",
    "blur this", "blur it please", "blurry", "a bit softer",
    *composed(
        does=("blur", "soften", "smooth", "defocus",),
        looks=("blurry", "blurrier", "soft", "unsharp", "out of focus",),
        brings=("blur", "more blur", "strong blur", "a gaussian blur", "softness",),
    ),
    "this should be much blurrier", "could the photo get a strong blur",
)  # fmt: skip
DEBLUR = (
    "deblur the image", "make the picture crisp", "remove the blur", "bring it into focus",
    "take the blur out of this photo", "undo the gaussian blur", "i want it sharp and clear",
    "deblur", "please deblur this photo", "less blur", "can you make it crisp",
    "a sharp clear version", "get rid of the blur", "recover the lost detail",
    "make it sharp", "unblur this", "sharpen", "sharpen this up",
    *composed(
        does=("deblur", "focus", "refocus",),
        looks=("crisp", "crisper", "sharp", "clear", "deblurred", "in focus",),
        brings=("clarity", "lost detail", "clear detail",),
        takes=("the blur", "the blurriness", "softness",),
    ),
    "this should be much crisper", "could the photo be deblurred and clear",
)  # fmt: skip
AGE = (
    "age the photo", "make the picture look old", "give it a vintage sepia look",
    "turn this into an old photograph", "fade it like an antique print",
    "add decades to this image", "weather the photograph", "age", "please age this picture",
    "an antique look", "can you make it old", "a faded sepia version", "make it vintage",
    "as old as possible",
    "older", "age this", "old photo look", "make it look vintage",
    *composed(
        does=("age", "antique", "fade",),
        looks=("old", "antique", "vintage", "faded", "sepia", "aged",),
        brings=("a vintage look", "sepia", "an antique feel", "age",),
    ),
    "this should look antique and faded", "could the photo become old and sepia",
)  # fmt: skip
RESTORE = (
    "restore the photo", "repair this old picture", "remove the sepia and the scratches",
    "make the old photograph look new", "undo the fading", "clean up this damaged print",
    "bring back the original colours", "restore", "please restore this picture", "a repaired print",
    "can you repair the damage", "a restored and clean version", "make it new again",
    "take the age out of this photo",
    "restore this", "fix this old photo", "repair", "remove scratches",
    *composed(
        does=("restore", "repair", "mend", "renew",),
        looks=("new", "restored", "repaired", "like new", "undamaged",),
        brings=("fresh colours", "a restoration",),
        takes=("the damage", "the sepia", "the scratches", "age",),
    ),
    "this should be restored and repaired", "could the damaged print look new",
)  # fmt: skip
DARKEN = (
    "darken the image", "make the picture darker", "lower the exposure", "turn the light down",
    "reduce the brightness", "i want this photo dim", "underexpose the shot", "darker",
    "please darken this photo", "less light", "can you make it dark", "a dim dark version",
    "less exposure", "darken everything a lot",
    "darken", "darken this", "too bright", "make it darker",
    *composed(
        does=("darken", "dim", "underexpose",),
        looks=("dark", "darker", "dim", "dimmer", "underexposed",),
        brings=("less light", "lower exposure", "low light", "less brightness", "darkness",),
    ),
    "this should be much darker", "could the photo get a lower exposure",
)  # fmt: skip
BRIGHTEN = (
    "brighten the image", "make the picture brighter", "raise the exposure", "turn the light up",
    "increase the brightness", "i want this photo bright", "lift the shadows of this shot",
    "brighter", "please brighten this photo", "more light", "can you make it bright",
    "a light bright version", "more exposure", "brighten everything a lot",
    "brighten", "brighten this", "too dark", "make it brighter",
    *composed(
        does=("brighten", "lighten", "illuminate",),
        looks=("bright", "brighter", "light", "lighter", "well lit",),
        brings=("more light", "higher exposure", "more brightness", "brightness",),
        takes=("the darkness",),
    ),
    "this should be much brighter", "could the photo get a higher exposure",
)  # fmt: skip
FOG = (
    "add fog", "make it foggy", "put haze over the picture", "a misty version", "let fog roll in",
    "make the air hazy", "i want it misty and pale", "fog", "please fog this photo", "more haze",
    "can you make it foggy", "a hazy foggy version", "cover the scene in mist",
    "thick fog everywhere",
    "foggy", "fog it up", "haze", "add some mist",
    *composed(
        does=("fog", "haze", "mist", "fog up",),
        looks=("foggy", "foggier", "hazy", "misty", "foggy and pale",),
        brings=("fog", "haze", "mist", "thick haze", "dense fog",),
    ),
    "this should be much foggier", "could the photo get a thick haze",
)  # fmt: skip
DEHAZE = (
    "dehaze the image", "remove the fog", "clear the air", "take the mist away",
    "get rid of the haze", "lift the fog", "i want the haze gone", "dehaze",
    "please dehaze this photo", "less fog", "can you clear the mist", "a version without haze",
    "cut through the fog", "clear air and full colour",
    "remove haze", "no fog", "defog", "remove the haze",
    *composed(
        does=("dehaze", "defog", "unveil",),
        looks=("fog free", "free of haze", "dehazed", "haze free",),
        brings=("clear air",),
        takes=("the fog", "haze", "the haze", "mist",),
    ),
    "this should lose its haze", "could the fog be removed",
)  # fmt: skip
