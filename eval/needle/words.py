"""The vocabulary of the needle evaluation: keys, values, noise lines, prose, coded words.

Everything is drawn from a `numpy.random.Generator` that is passed in. Changing a word changes every document: raise
`farspan.eval.needle.tasks.VERSION` with it.
"""

import uuid
from collections.abc import Iterator

import numpy as np


def _split(text: str) -> list[str]:
    """Words and, where "_" joins their parts, phrases."""
    return [word.replace("_", " ") for word in text.split()]


# No adjective ends another and no noun begins another, so that no "adjective-noun" is contained in a different one
# (a reference counts where the prediction contains it).
ADJECTIVES = _split("""
able abrupt absent acid active agile alert alpine amber ample ancient angular annual antique apt arctic ardent arid
artful ashen atomic austere autumn avid awake azure bald balmy barren basic beaming bleak blithe blond bold boreal
bouncy brash brave breezy brief bright brisk brittle broad bronze bubbly bulky burly busy calm candid canny careful
casual cautious central chalky charming cheerful chilly chubby civic classic clever cloudy clumsy coarse coastal
cobalt colossal compact complex concave constant copper coral cordial cosmic covert coy cozy crafty crimson crisp
crooked crunchy cubic curious curly cyan dainty dapper daring dazzling deep deft dense devout diligent dim direct
distant docile dormant double drafty dreamy droll dry dull dusky dutiful eager earnest earthy eastern elastic
elegant elfin eloquent emerald eminent empty enormous epic equal ethereal even exact exotic expert fabled faint fair
famous fancy fearless feral fertile festive fierce fine firm flat fleet floral fluent fluffy foamy focal fond formal
frank fresh frosty frugal full furry gallant gaudy gaunt gentle giant gifted gilded glad gleaming glossy golden
graceful grand granite grassy gray gritty groovy gruff hardy harmless hasty hazel hearty hefty helpful hidden hollow
honest humble husky icy ideal immense indigo inland ivory jade jagged jaunty jolly jovial joyful keen kind knotty
lanky large lasting lavish lazy leafy lean limber linear lively lofty lonely loose loud loyal lucid lunar lush
magenta magnetic marble maroon meek mellow merry mighty mild minty misty modern modest mossy muddy muted mystic
narrow native nautical navy neat neutral nimble noble nocturnal northern novel oaken oblong obscure oceanic ochre
odd olive opaque open orange ornate oval pale patient pearly pensive perky petite plain pliant plucky polar polite
portly prim proud prudent purple quaint quick quiet radiant rapid rare regal remote rigid ripe robust rosy rotund
rough royal ruby rugged rural russet rustic sage salty sandy sapphire scarlet scenic secluded sepia serene shaggy
sharp sheer shiny shy silent silken silver simple sleek slender slim smooth snowy snug sober soft solar solemn solid
sonic southern spare spiral spry stark steady steep sterling stiff stoic stout strict sturdy suave subtle sunny
supple swift tame tangy tart teal tender tepid terse thick thrifty tidal tidy timid tiny topaz tough tranquil
tropical turquoise umber upbeat urban vacant valiant vast velvet verbal vibrant violet vital vivid warm wary wavy
western wild wily windy wise witty wooden woolly wry yellow young zany zealous zesty
""")

NOUNS = _split("""
abbey acorn airport album alcove alley almond altar anchor antler anvil apple apron aquarium arcade arch armor arrow
atlas attic avenue axle badge bagel balcony ballad bamboo banana banjo banner barge barley barn barrel basin basket
bassoon bathtub beacon beagle beaver bell bench berry bicycle bison blanket blossom bottle boulder bramble branch
brick bridge brook broom bucket buckle bugle bunker butter button cabin cactus camel camera canal candle canoe
canopy canyon caravan cargo carpet carriage carrot castle cathedral cavern cedar cellar cello chapel cherry chest
chimney chisel cinema cinnamon circus citadel clarinet clay cliff clock clover coach cobbler coconut collar comet
compass condor cookie corridor cottage cotton cougar courtyard cradle crane crater crayon creek cricket crown
crystal cupboard cupola curtain cushion cypress dagger daisy dam delta desert desk diamond ditch dolphin dome donkey
door dove dragon drawer drum dune eagle easel echo elbow elm engine envelope estuary falcon farm feather fence fern
ferry fiddle field fig finch fjord flagpole flask flute forest forge fort fossil fountain fox freighter gallery
garden garlic garnet gate gazelle geyser ginger giraffe glacier globe glove goblet gondola goose gorge granary grape
gravel grotto guitar gutter hammer hammock hamster harbor harness harp harvest hatchet hawk hedge helmet heron hill
hinge honey hood hornet horse hotel hutch iceberg igloo inlet iris iron island jacket jaguar jar jasmine jetty
jigsaw jungle juniper kayak kennel kettle keyhole kiosk kitchen kite knapsack koala ladder ladle lagoon lantern
larch lark lava lawn ledge lemon lens lettuce library lichen lighthouse lilac lily lizard lobster locket lodge loft
loom lotus lynx magnet magpie mallet mango manor mantle maple market marmot marsh mast meadow medal melon mill mint
mirror mitten monsoon moon moose mosaic moth motor mountain mug museum mushroom mustard napkin nectar needle nest
nickel notebook nutmeg oar oasis oat oboe ocean octopus onion orbit orchard orchid organ osprey ostrich otter oven
owl oyster paddle palace palm panda panther papaya paper parade parrot pasture path pavilion peach peanut pebble
pelican pencil penguin pepper piano pigeon pillar pillow pine pistachio planet plateau plaza plum pocket pond poplar
poppy porch potato prairie prism pulley pump puppet puzzle pyramid quarry quartz quilt rabbit radish raft railway
raisin ranch raven reef ribbon ridge river robin rocket roof rooster rope rudder saddle saffron sail salmon sandal
satchel saucer scarf school scooter seagull shelf shell sheriff shovel shutter sickle skillet sled sleeve slipper
snail sofa spade sparrow spire sponge spoon spruce squirrel stadium staircase starfish statue stove stream summit
sundial swan sword table tambourine tavern teapot temple tent terrace theater thimble thistle throne thunder tiger
timber toaster tomato torch tortoise tower tractor trail tram trumpet trunk tulip tundra tunnel turnip turtle
umbrella valley vanilla vase vault veranda village vine violin volcano wagon wallet walnut walrus waterfall weasel
whale wharf wheat wheel whistle willow window winter wizard wolf workshop yacht yarn zebra zephyr zipper
""")

NOISE = (
    "Rain falls on the roof.",
    "A dog barks twice.",
    "The kettle is warm.",
    "We wait a while.",
    "Nothing else happens.",
)

# One of each makes a sentence: 28 million of them, none longer than 80 characters.
_SUBJECTS = _split("""
My_aunt The_baker A_tall_boy The_captain Our_cook The_dancer The_farmer A_guard The_judge The_mason My_niece
The_nurse An_old_man The_painter A_pilot The_poet The_sailor A_singer The_tailor Her_teacher The_twins His_uncle
The_vet A_visitor The_watchman The_weaver Our_cousin The_drummer A_monk The_gardener
""")
_VERBS = _split("""
drew sold found lost carried mended hid bought washed painted wrapped moved weighed borrowed cleaned measured
counted dropped packed returned sketched traded tested shook lifted opened tied guarded praised noticed
""")
_OBJECTS = _split("""
a_red_box two_maps the_old_bell a_rope some_salt a_lamp the_tin_cup a_wool_coat six_plates a_glass_jar the_blue_boat
a_clock three_keys a_drum the_long_bench a_fish warm_bread a_letter the_net an_oak_chair a_stamp dry_wood a_kite
the_gold_ring ten_nails a_mirror fresh_tea a_wheel the_green_tent a_book
""")
_PLACES = _split("""
by_the_mill at_the_pier in_town near_the_well on_the_hill at_home in_the_barn by_the_road at_school in_a_cave
under_the_bridge by_the_sea in_the_attic at_the_fair on_the_deck near_the_wall in_the_yard at_the_inn by_the_gate
in_the_woods on_the_stairs at_the_farm in_the_hall by_the_oven near_the_pond on_the_roof in_the_rain at_the_bank
by_the_fire on_the_ice in_the_square at_the_dock
""")
_TIMES = _split("""
at_noon at_dawn on_Monday last_week in_May at_dusk one_night again in_spring that_day at_five before_lunch in_July
on_Friday at_last after_work once this_year all_day in_a_hurry twice at_night last_fall alone on_Sunday with_care
for_fun in_silence late by_chance in_March today in_winter
""")
PROSE_PARTS = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES, _TIMES)

_BLOCK = 64
_FEWEST_FREE = 10  # of the values of a kind, one in so many is left undrawn: rejection stays quick


def prose(rng: np.random.Generator) -> Iterator[str]:
    """Sentences of the grammar without end, each once, for example "The baker sold two maps in town at noon."."""
    seen = set()
    while True:
        for row in rng.integers(0, [len(part) for part in PROSE_PARTS], (_BLOCK, len(PROSE_PARTS))):
            sentence = " ".join(part[i] for part, i in zip(PROSE_PARTS, row, strict=True)) + "."
            if sentence not in seen:
                seen.add(sentence)
                yield sentence


def short_prose(rng: np.random.Generator, count: int) -> list[str]:
    """`count` sentences of a few words, which fill what is left where a sentence of `prose` is too long."""
    return [f"{_SUBJECTS[s]} {_VERBS[v]} it." for s, v in rng.integers(0, [len(_SUBJECTS), len(_VERBS)], (count, 2))]


def distinct(kind: str, rng: np.random.Generator) -> Iterator[str]:
    """Strings of a kind, each once, none contained in another.

    kind: "word" (adjective-noun), "number" (7 digits) or "uuid" (version 4)
    Raises ValueError where the kind has no more: 168,000 words, 8.1 million numbers.
    """
    draw, total = {
        "word": (_word, len(ADJECTIVES) * len(NOUNS)),
        "number": (_number, 9_000_000),
        "uuid": (_uuid, 2**122),
    }[kind]
    seen: set[str] = set()
    while len(seen) < total - total // _FEWEST_FREE:
        text = draw(rng)
        if text not in seen:
            seen.add(text)
            yield text
    raise ValueError(f"the {len(seen):,} values of kind {kind!r} are used up; use the kind 'uuid' or a shorter length")


def coded(rng: np.random.Generator, count: int, letters: int, alphabet: str) -> list[str]:
    """`count` distinct strings of `letters` random letters of the alphabet."""
    found: dict[str, None] = {}
    while len(found) < count:
        rows = rng.integers(0, len(alphabet), (count, letters))
        found.update((("".join(alphabet[i] for i in row)), None) for row in rows)
    return list(found)[:count]


def listed(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _word(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
