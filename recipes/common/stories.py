"""Small English stories in the spirit of TinyStories (Eldan and Li, 2023, arXiv 2305.07759), made from a seed.

A story is a chain of passages: an opening, a habit, the three passages of a plot, something seen on the way, an
ending. A passage is one template with its fillers. The hero, the friend, the thing and the place stay the same
through a story; all other fillers are drawn anew for each passage.
"""

import random
from hashlib import sha256


def _words(slots: dict[str, str]) -> dict[str, list[str]]:
    return {slot: words.split(", ") for slot, words in slots.items()}


NAMES = _words(
    {
        "girl": "Lily, Mia, Anna, Sue, Rosie, Ella, Nora, Daisy, Poppy, Zoe, Ivy, Molly, Clara, Hannah, Wendy, Tess",
        "boy": "Tom, Ben, Max, Tim, Sam, Leo, Finn, Jack, Oscar, Toby, Hugo, Peter, Milo, Felix, Danny, Gus",
    }
)
PRONOUNS = {
    "girl": {"they": "she", "them": "her", "their": "her", "They": "She", "Their": "Her"},
    "boy": {"they": "he", "them": "him", "their": "his", "They": "He", "Their": "His"},
}
CAST = _words(
    {
        "kind": "fox, rabbit, mouse, bear, hedgehog, duck, squirrel, frog, turtle, cat, puppy, pony, goat, badger",
        "other": "hen, sheep, donkey, beaver, lamb, goose, kitten, lizard, pig, swan, deer, crow",
        "thing": "kite, ball, drum, boat, hat, book, bell, lamp, cup, ring, map, flute, wagon, button, feather",
        "place": "forest, garden, meadow, village, hill, river, farm, beach, pond, valley, market, castle",
    }
)
# What can follow "a" starts with a consonant.
FILLERS = _words(
    {
        "trait": "brave, shy, kind, clever, lazy, curious, gentle, noisy, quiet, proud, silly, careful, cheerful",
        "look": "red, blue, green, yellow, tiny, big, shiny, soft, broken, pretty, dusty, golden, striped, round",
        "when": "one morning, one sunny day, after lunch, before bed, one cold night, on a rainy day, that evening, "
        "the next day, early in spring, when the snow fell, at noon, late one night",
        "where": "under a tree, behind the barn, near the bridge, on a rock, by the gate, in the tall grass, "
        "beside the well, in a deep hole, at the end of the road, under the bed, on the roof, in a box",
        "mood": "happy, sad, scared, angry, worried, sleepy, surprised, lonely, tired, calm, excited, sorry",
        "how": "slowly, quickly, softly, loudly, gently, happily, carefully, bravely, quietly, kindly",
        "food": "bread, cheese, honey, soup, berries, pie, nuts, cake, carrots, milk, apples, plums",
        "does": "sing, dance, run, paint, climb, swim, read, bake, dig, count the stars, jump in puddles, "
        "pick flowers, look at the clouds, tell jokes",
        "seen": "butterfly, snail, rainbow, spider, star, cloud, worm, bee, leaf, moon, fish, beetle",
        "number": "two, three, four, five, six, seven, ten, twelve",
    }
)

OPENINGS = (
    "Once upon a time, there was a {trait} {kind} named {name}. {They} lived in a {look} house near the {place}.",
    "In a {look} house by the {place} lived a {kind}. {Their} name was {name}, and {they} was very {trait}.",
    "{name} was a {trait} {kind}. {They} had a {look} {thing} and {number} friends.",
    "There once was a {kind} called {name} who had a {look} {thing}. Everyone in the {place} said {they} was {trait}.",
    "Long ago, a {trait} little {kind} came to the {place} {when}. {Their} name was {name}.",
    "Far away, {where}, there lived a {trait} {kind}. Everyone called {them} {name}.",
)
HABITS = (
    "Every day, {name} liked to {does} and eat {food}.",
    "{name} loved {their} {thing}. {They} took it along to {does} {where}.",
    "{Their} best friend was {friend}, a {trait} {other}. They liked to {does} together.",
    "Most of all, {name} loved to {does} with {friend} the {other} and share some {food}.",
    "{name} could {does} all day, but {they} was often {mood} when it was time to stop.",
    "When {name} was {mood}, {they} went to the {place} to {does}.",
)
PLOTS = (
    (  # something is lost
        (
            "But {when}, the {thing} was gone! {name} looked {where}, but it was not there.",
            "{When}, {name} could not find {their} {look} {thing}. {They} was very {mood}.",
            "Then {when}, a {trait} wind took the {thing} away, and {name} felt {mood}.",
            "{name} dropped {their} {thing} {where} {when}, and {they} did not see it fall.",
        ),
        (
            '"Have you seen my {look} {thing}?" {name} asked {how}. {friend} said, "Let us look {where}."',
            "{friend} the {other} came {how} to help. They looked {where} for {number} hours.",
            '"Do not be {mood}," said {friend} {how}. "I saw something {look} {where}."',
            "So {name} and {friend} walked {how} through the {place} and asked {number} {look} birds.",
        ),
        (
            "At last, they found the {thing} {where}. It was a little {look}, but {name} was {mood} no more.",
            "There it was, {where}! {name} hugged the {thing} {how} and gave {friend} some {food}.",
            "A {trait} old owl had kept it {where}. {They} gave it back {how} for some {food}.",
            "The {thing} was {where} all the time! They both laughed {how} and ate {food}.",
        ),
    ),
    (  # a friend needs help
        (
            "{When}, {name} heard somebody cry {where}. It was {friend}, a {trait} {other}.",
            "{name} met {friend} the {other} {where} {when}. {friend} looked {mood}.",
            "But {when}, {friend} fell down {where} and shouted {how} for help.",
            "{When}, a {look} letter came. {friend} the {other} was stuck {where}!",
        ),
        (
            '"Why are you so {mood}?" asked {name} {how}. "I have no {food} to eat," said {friend}.',
            "{name} was {mood}, but {they} ran {how} over the hill with {number} baskets of {food}.",
            '"Please help me," said {friend} {how}. {name} thought for {number} minutes and felt {mood}.',
            "{name} tied the {look} {thing} to a rope and pulled {how} {number} times.",
        ),
        (
            "Soon {friend} was safe. They sat {where} and ate {number} bowls of {food}.",
            'After that, {friend} felt less {mood}. "You are so {trait}!" said {friend} {how}.',
            "{name} gave {friend} some {food} and a {look} {thing}, and nobody was {mood} any more.",
            "It worked! {friend} smiled {how} and sat down {where} with some {food}.",
        ),
    ),
    (  # a fear is met
        (
            "{When}, there was a {look} light {where}. {name} was too {mood} to sleep.",
            "But {when}, a storm came to the {place}. {name} felt {mood} and hid {where}.",
            "{name} had to cross the {place} alone {when}. {They} was {mood} and walked {how}.",
            "{When}, {name} heard a {look} monster {where}. It growled {how}.",
        ),
        (
            'But {they} held {their} {thing} and said {how}, "I am {trait}. I can do it."',
            "{They} counted to {number} and looked {how} {where}.",
            '"Who is there?" {they} called {how}. Something {look} moved {where}.',
            "{They} thought of {friend} the {other}, who was always {trait}, and went on {how}.",
        ),
        (
            "It was only {friend} with a {look} {thing} and some {food}! They laughed {how}.",
            "Then the sun came out {where}, and {name} could {does} again and was {mood} no more.",
            "There was no monster, only {number} {look} leaves {where}. {name} laughed {how}.",
            "It was a {trait} {other} who had lost {number} {look} shoes. {name} helped {how}.",
        ),
    ),
    (  # something is shared
        (
            "{When}, {name} found a {look} {thing} {where}.",
            "{name} got a {look} {thing} {when} and showed it {how} to {friend} the {other}.",
            "{name} made {number} pots of {food} {when} and put them {where}.",
            "There was a {look} party {where} {when}. {name} took along some {food}.",
        ),
        (
            '"May I have it for {number} days?" asked {friend} {how}. {name} felt {mood} and said no.',
            "{friend} wanted it too. They shouted {how} at each other {where}.",
            '"It is mine!" said {name} {how}. {friend} went away to sit {where}, all {mood}.',
            "{friend} had only {number} crumbs of {food} and looked {mood}.",
        ),
        (
            "Then {name} felt {mood}. {They} broke the {food} in two and gave {friend} the {look} half.",
            '"I am sorry that I was not {trait}," said {name} {how}. They sat {where} together.',
            "In the end they both used the {thing} to {does} {where}.",
            "{name} said {how} that friends should share {food} and {does} together.",
        ),
    ),
)
SIGHTS = (
    "On the way home they saw a {look} {seen} {where}.",
    "A {look} {seen} and {number} birds watched them {how}.",
    "The {place} was full of {look} flowers, and it smelled of {food}.",
    "{name} and {friend} stopped to {does} {where} for a while.",
    "High above the {place} was a {look} {seen}. It moved {how}.",
    "Mother had made {food} and waited {where}. She was {mood}.",
)
ENDINGS = (
    "From then on, {name} was never {mood} again. The end.",
    "{name} went to bed {how} and dreamed of {number} {look} boats. The end.",
    "That night, {name} and {friend} ate {food} {where} and felt {mood}.",
    "And so {name} learned to be {trait}, even when {they} felt {mood}.",
    "They {how} said good night and promised to {does} again {when}.",
    'And {name} said, "It is good to be {trait} and to {does} with a friend."',
)


def split_of(passage: str) -> str:
    """The one split that a passage belongs to: by its hash, a tenth each is validation and test, whatever the seed."""
    bucket = int.from_bytes(sha256(passage.encode()).digest()[:4], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def tell(rng: random.Random, split: str) -> list[str]:
    """One story as its passages, all of which belong to `split`."""
    hero, friend = rng.sample([(name, sort) for sort, names in NAMES.items() for name in names], 2)
    cast = {"name": hero[0], "friend": friend[0], **PRONOUNS[hero[1]]}
    cast |= {slot: rng.choice(words) for slot, words in CAST.items()}
    passages = []
    for templates in (OPENINGS, HABITS, *rng.choice(PLOTS), SIGHTS, ENDINGS):
        passage = ""
        while not passage or split_of(passage) != split:
            fillers = {slot: rng.choice(words) for slot, words in FILLERS.items()}
            fillers["When"] = fillers["when"].capitalize()
            passage = rng.choice(templates).format(**cast, **fillers)
        passages.append(passage)
    return passages


def tell_stories(count: int, seed: int) -> dict[str, list[str]]:
    """Makes `count` stories: a twentieth each for validation and test, the rest for training.

    No passage, that is, no combination of a template and its fillers, occurs in two splits, under any seed.

    Example:
        >>> {split: len(stories) for split, stories in tell_stories(100, seed=0).items()}
        {'train': 90, 'validation': 5, 'test': 5}

    Raises:
        ValueError: `count` is below 100, which leaves too little to measure on.
    """
    if count < 100:
        raise ValueError(f"num_stories must be at least 100, got {count}: a twentieth of them is the test split.")
    counts = {"train": count - 2 * (count // 20), "validation": count // 20, "test": count // 20}
    stories = {}
    for split, size in counts.items():
        rng = random.Random(f"{seed} {split}")  # one each: more training stories leave the test stories as they are
        stories[split] = [" ".join(tell(rng, split)) for _ in range(size)]
    return stories
