"""The words of the general domain: captions and the zero-shot prompts."""

from __future__ import annotations

import numpy as np

from medfast.data.phantom.cases import COUNTS, NO_FINDING, SIDES, SIZES, WORDS, Sample
from medfast.data.phantom.general.cases import (
    CLASSES,
    COLOURS,
    FLYING,
    SWIMMING,
    Scene,
    Thing,
)
from medfast.data.phantom.wording import capitalised, pick

# The options under one key are interchangeable; the first is the plainest and serves the prompts.
_PHOTOS = ("photo", "picture", "photograph", "snapshot")
_GREY_PHOTOS = ("black-and-white photo", "monochrome picture", *_PHOTOS[:2])
_SCENE_NOUNS = {
    "meadow": ("meadow", "grassy field", "pasture"),
    "beach": ("beach", "sandy beach", "seaside"),
    "street": ("street", "city street", "town"),
    "room": ("room", "living room", "indoors"),
    "snow": ("snow", "winter landscape", "snowy hills"),
    "desert": ("desert", "sandy desert", "dunes"),
}
# Where things stand, and where they fly.
_PLACES = {
    "meadow": (
        ("in a meadow", "above a meadow"),
        ("on a grassy field", "over a grassy field"),
        ("in a pasture", "above a pasture"),
    ),
    "beach": (
        ("on a beach", "above a beach"),
        ("on a sandy beach", "over a sandy beach"),
        ("at the seaside", "above the seaside"),
    ),
    "street": (
        ("in a street", "above a street"),
        ("on a city street", "over a city street"),
        ("in a town", "above the houses of a town"),
    ),
    "room": (
        ("in a room", "in the air of a room"),
        ("in a living room", "floating in a living room"),
        ("indoors", "in the air indoors"),
    ),
    "snow": (
        ("in the snow", "above the snow"),
        ("in a winter landscape", "over a winter landscape"),
        ("among snowy hills", "above snowy hills"),
    ),
    "desert": (
        ("in a desert", "above a desert"),
        ("in a sandy desert", "over a sandy desert"),
        ("among dunes", "above the dunes"),
    ),
}
_AT_SEA = ("on the sea off a beach", "on the water off a sandy beach", "at sea near the seaside")
_SETTINGS = {
    "sunny": ("on a sunny day", "in bright sunshine", "under a clear sky"),
    "cloudy": ("on a cloudy day", "under a cloudy sky", "under heavy clouds"),
    "sunset": ("at sunset", "at dusk", "in the evening sun"),
    "night": ("at night", "under the stars", "by moonlight"),
    "brick wall": ("with a brick wall", "with a wall of bricks", "with bare bricks behind"),
    "striped wall": ("with a striped wall", "with striped wallpaper", "with stripes on the wall"),
    "plain wall": ("with a plain wall", "with a bare wall", "with a smooth wall behind"),
}
_THING_NOUNS = {
    "ball": (("ball", "balls"), ("beach ball", "beach balls"), ("toy ball", "toy balls")),
    "balloon": (
        ("balloon", "balloons"),
        ("party balloon", "party balloons"),
        ("balloon on a string", "balloons on strings"),
    ),
    "bird": (
        ("bird", "birds"),
        ("flying bird", "flying birds"),
        ("bird in flight", "birds in flight"),
    ),
    "boat": (("boat", "boats"), ("sailing boat", "sailing boats"), ("sailboat", "sailboats")),
    "car": (("car", "cars"), ("automobile", "automobiles"), ("parked car", "parked cars")),
    "chair": (("chair", "chairs"), ("wooden chair", "wooden chairs"), ("seat", "seats")),
    "cup": (("cup", "cups"), ("mug", "mugs"), ("coffee cup", "coffee cups")),
    "flower": (
        ("flower", "flowers"),
        ("blooming flower", "blooming flowers"),
        ("blossom on a stem", "blossoms on stems"),
    ),
    "house": (("house", "houses"), ("cottage", "cottages"), ("wooden house", "wooden houses")),
    "lamp": (("lamp", "lamps"), ("table lamp", "table lamps"), ("reading lamp", "reading lamps")),
    "tree": (("tree", "trees"), ("leafy tree", "leafy trees"), ("round tree", "round trees")),
    "umbrella": (
        ("umbrella", "umbrellas"),
        ("parasol", "parasols"),
        ("open umbrella", "open umbrellas"),
    ),
}
_COLOUR_WORDS = {
    "red": ("red", "bright red", "scarlet"),
    "orange": ("orange", "bright orange", "tangerine"),
    "yellow": ("yellow", "bright yellow", "golden"),
    "green": ("green", "bright green", "emerald"),
    "blue": ("blue", "bright blue", "azure"),
    "purple": ("purple", "bright purple", "violet"),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
# Before a noun with a verb only numerals, so that "a pair" never has to choose its verb.
_NUMERALS = {
    "one": ("a single", "one", "a lone"),
    "two": ("two", "two", "two separate"),
    "three": ("three", "three", "three separate"),
}
_QUANTITIES = {
    "one": ("a single", "one", "a lone", "just one"),
    "two": ("two", "a pair of", "two separate", "a total of two"),
    "three": ("three", "a trio of", "three separate", "a total of three"),
}
_SIDES = ("on the {}", "on the {}", "on the {} side", "in the {} half")

_TEMPLATES = (
    "a {photo} of {things} {side}, {where}.",
    "a {photo} showing {things} {side}, {where}.",
    "{photo}: {things} {side}, {where}.",
    "{things} {side}, {where}.",
    "{things} {where}, {side} of the {photo}.",
    "{where}, {things} can be seen {side}.",
    "{where}, with {things} {side}.",
    "{where}. There {verb} {counted} {side}.",
    "there {verb} {counted} {side}, {where}.",
    "{side} {verb} {counted}, {where}.",
    "this {photo} was taken {where}. {counted} {verb} visible {side}.",
    "this {photo} shows {things} {side}. It was taken {where}.",
    "look at {things} {side}, {where}.",
    "tags: {scene}, {noun}, {traits}, {number}, {side}.",
)
# People do not tell everything that they see.
_SHORT_TEMPLATES = (
    "a {photo} of {quantity} {noun} {where}.",
    "a {photo} of {things} {where}.",
    "{things} {where}.",
    "{quantity} {noun} {side}.",
)
_EMPTY_TEMPLATES = (
    "a {photo} taken {where}, with nothing in it.",
    "an empty {photo} taken {where}.",
    "{where}, and nothing else.",
    "{where}. Nothing else can be seen.",
    "a view {where} without any object.",
    "there is nothing to see {where}.",
)
_FILLERS = (
    "Nobody is around.",
    "It was a quiet day.",
    "We took it on holiday.",
    "From an old album.",
    "Shot with a phone.",
    "What a lovely place.",
)
_FILLER_SHARE = 0.25
_SHORT_SHARE = 0.12
_COLOUR_SHARE = 0.8
_SETTING_SHARE = 0.6


def caption(sample: Sample[Scene]) -> str:
    """Return the caption of a sample; most name all that it shows, some leave details out.

    The template and the synonyms depend on the sample's key alone, never on the details: with
    another detail only its own words change, and plurals and verbs with it.
    """
    scene, rng = sample.case, sample.rng(WORDS)
    photo = pick(rng, _GREY_PHOTOS if scene.grey else _PHOTOS)
    where = _where(scene, rng)
    if scene.finding is None:
        text = pick(rng, _EMPTY_TEMPLATES).format(photo=photo, where=where)
    else:
        short = rng.random() < _SHORT_SHARE
        template = pick(rng, _SHORT_TEMPLATES if short else _TEMPLATES)
        words = _thing_words(scene, scene.finding, rng)
        text = template.format(photo=photo, where=where, **words)
    if rng.random() < _FILLER_SHARE:
        text = f"{text} {pick(rng, _FILLERS)}"
    return capitalised(text)


def prompts(label: str) -> list[list[str]]:
    """Return the zero-shot prompts of a label set: an ensemble of phrases per class.

    The prompts of a class differ in everything but the class, evenly, so that their mean says
    nothing else.
    """
    return [_PROMPTS[label](name) for name in CLASSES[label]]


def _scene_prompts(scene: str) -> list[str]:
    return [
        f"a photo of {things} on the {side}, {places[kind in FLYING]}"
        for places in _PLACES[scene]
        for side in SIDES
        for kind, things in _examples()
    ]


def _setting_prompts(setting: str) -> list[str]:
    return [
        f"a photo of {things} {phrase}"
        for phrase in _SETTINGS[setting]
        for _, things in _examples()
    ]


def _thing_prompts(thing: str) -> list[str]:
    if thing == NO_FINDING:
        return [
            template.format(photo="photo", where=places[0][0])
            for template in _EMPTY_TEMPLATES
            for places in _PLACES.values()
        ]
    return [
        phrase
        for singular, plural in _THING_NOUNS[thing]
        for phrase in (f"a photo of a single small {singular}", f"two large {plural}")
    ]


def _side_prompts(side: str) -> list[str]:
    return [f"{things} on the {side}" for _, things in _examples()]


def _size_prompts(size: str) -> list[str]:
    return [
        f"a single {word} {nouns[0][0]}"
        for word in _SIZE_WORDS[size]
        for nouns in _THING_NOUNS.values()
    ]


def _count_prompts(count: str) -> list[str]:
    return [
        f"{numeral} {nouns[0][count != 'one']}"
        for numeral in dict.fromkeys(_NUMERALS[count])
        for nouns in _THING_NOUNS.values()
    ]


def _colour_prompts(colour: str) -> list[str]:
    return [
        f"a photo of a single {word} {nouns[0][0]}"
        for word in _COLOUR_WORDS[colour]
        for nouns in _THING_NOUNS.values()
    ]


def _examples() -> list[tuple[str, str]]:
    """Return every thing and words for it, in a size, colour and count that take turns."""
    return [
        (
            thing,
            f"{_NUMERALS[COUNTS[i % 3]][0]} {SIZES[i % 2]} {COLOURS[i % 6]} {nouns[0][i % 3 > 0]}",
        )
        for i, (thing, nouns) in enumerate(_THING_NOUNS.items())
    ]


_PROMPTS = {
    "modality": _scene_prompts,
    "setting": _setting_prompts,
    "finding": _thing_prompts,
    "side": _side_prompts,
    "size": _size_prompts,
    "count": _count_prompts,
    "colour": _colour_prompts,
}


def _where(scene: Scene, rng: np.random.Generator) -> str:
    kind = None if scene.finding is None else scene.finding.kind
    ground, air = pick(rng, _PLACES[scene.modality])
    sea = pick(rng, _AT_SEA)
    place = air if kind in FLYING else sea if kind in SWIMMING else ground
    setting = pick(rng, _SETTINGS[scene.setting])
    return f"{place} {setting}" if rng.random() < _SETTING_SHARE else place


def _thing_words(scene: Scene, thing: Thing, rng: np.random.Generator) -> dict[str, str]:
    single = thing.count == "one"
    singular, plural = pick(rng, _THING_NOUNS[thing.kind])
    noun = singular if single else plural
    size = pick(rng, _SIZE_WORDS[thing.size])
    colour = pick(rng, _COLOUR_WORDS[thing.colour])
    coloured = rng.random() < _COLOUR_SHARE and not scene.grey
    traits = f"{size} {colour}" if coloured else size
    quantity = pick(rng, _QUANTITIES[thing.count])
    return {
        "scene": pick(rng, _SCENE_NOUNS[scene.modality]),
        "side": pick(rng, _SIDES).format(thing.side),
        "noun": noun,
        "traits": traits,
        "number": thing.count,
        "verb": "is" if single else "are",
        "quantity": quantity,
        "things": f"{quantity} {traits} {noun}",
        "counted": f"{pick(rng, _NUMERALS[thing.count])} {traits} {noun}",
    }
