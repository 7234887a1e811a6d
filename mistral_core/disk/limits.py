"""The most that is accepted of every number that a file or a server gives: the one table.

A constant is named after what it counts; its unit and its reason stand beside it. A number is compared before anything
is made of it, so that a file of a few hundred bytes cannot cost gigabytes or minutes.
"""

from __future__ import annotations

from ..errors import LimitExceededError, MistralError

# Files

JSON_BYTES = 1 << 20  # bytes of a config; published ones have a thousandth
TEXT_BYTES = 64 << 20  # bytes of a tokenizer or a licence; Tekken's tokenizer.json has 17 million
MANIFEST_BYTES = 10 << 20  # bytes of a manifest, an index or zarr's metadata: 20 000 tensors of 500 bytes each
FILES = 200_000  # files of a directory; a tree of zarr has one a chunk

ATTEMPTS = 5  # times that a directory is opened anew which others replace while it is read
KEPT_FILES = 64  # files of weights that are kept open: a process has some thousand

LISTED = 200  # names in one message; a model of 20 layers has so many

# Containers of weights

TENSORS = 20_000  # arrays of a checkpoint; the deepest published Mistral has 800
RANK = 4  # axes of an array; Mistral's have one or two, MaxText's three
SHARDS = 1000  # files of weights that an index names; the largest published have 200
JSON_DEPTH = 16  # objects and lists in each other; a config has four
SAFETENSORS_HEADER_BYTES = 25_000_000  # of a header; 150 a tensor, the library takes four times as much
ZIP_DIRECTORY_BYTES = 4 << 20  # of a zip's table of contents; 100 a member
ZIP_MEMBERS = 1000  # files in a .keras archive; it has three
GGUF_HEADER_BYTES = 64 << 20  # of a header; a tokenizer is in it
GGUF_KEYS = 10_000  # keys and values; published files have 50
GGUF_ITEMS = 2_000_000  # items of one list; a tokenizer has a million merges
GGUF_ALIGNMENT = 1 << 16  # bytes to which tensors are aligned; 32 is usual
HDF5_BYTES = 64 << 20  # of all that is no number: names, groups, attributes
CONTAINER_DEPTH = 16  # groups in each other in HDF5, maps in msgpack; Keras has nine
TREE_KEYS = 200_000  # keys of a tree of msgpack, chunks among them; ten for each array
NAME_BYTES = 256  # of a tensor's, a key's or a group's name; published ones have 100
PICKLE_BYTES = 1 << 20  # bytes of a pickle without its numbers; 300 a tensor
PICKLE_DEPTH = 32  # containers within one another in a pickle; a state dict has four
PICKLE_OPS = 1 << 20  # steps of a pickle; 25 a tensor
ADAPTER_REPEATS = 4  # repetitions in a regular expression of an adapter's config; steps grow with their power

# Examples to learn from

LINE_BYTES = 16 << 20  # bytes of a line of JSON: a conversation or a text; a book has one
LINE_DEPTH = 64  # objects and lists in each other: tools with their parameters; as in chat templates
METRICS_BYTES = 1 << 30  # bytes of a run's metrics; 200 a step

# A hub

API_BYTES = 32 << 20  # bytes of an answer in JSON; 200 for each file of a repository
PATH_LETTERS = 1024  # letters of a file's name with its folders
ADDRESS_LETTERS = 16_384  # letters of an address that a redirect gives; signed ones have two thousand
REDIRECTS = 8  # one after the other; the hub has two
DOWNLOAD_BYTES = 1 << 40  # bytes of one file
UNANNOUNCED_BYTES = 64 << 20  # bytes of a file whose size nobody told: not one of weights
HEAD_SECONDS = 30  # seconds until an answer begins, however slowly its head comes
SLOW_SECONDS = 20  # seconds over which the speed of a download is looked at
SLOW_BYTES = 1024  # bytes a second that a download must have, over those: also its longest time, size / SLOW_BYTES

# Chat templates

TEMPLATES = 64  # of one checkpoint; published ones have three
TEMPLATE_DEPTH = 64  # lists and dicts in each other, of messages and tools
TEMPLATE_INTEGER_BITS = 64  # of a number in them

# Config

PARAMETERS = 1 << 42  # numbers of a model; the largest published have 2^40
LAYERS = 1024  # the deepest published Mistral has 88
LABELS = 1 << 17  # classes of a head: as many as the largest vocabulary
VOCABULARY = 1 << 22  # tokens; the largest published tokenizers have 2^18
WIDTH = 1 << 20  # numbers of a hidden state, of the inside of an MLP and of all heads together; the widest has 2^16
HEADS = 1 << 12  # query heads of a layer; the most published have 128
HEAD_DIM = 1 << 14  # numbers of a head; the largest published have 512
POSITIONS = (1 << 31) - 1  # tokens of a text or a window: only compared, nothing is made of this size

# Tokenizers

TOKEN_CHARACTERS = 4096  # of one token, whose every place is looked at; the longest that were published have 256
TEKKEN_WORDS = 1 << 20  # of a tekken.json, special ones included; published ones have 2^17
SPECIAL_TOKENS = 1 << 14  # Tekken has 1000; each is looked for in what users write
TOKENS_AROUND = 1024  # special tokens that a post-processor puts around a text
WORD_CHARACTERS = 1024  # of a word that WordPiece reads, in the square of it; 100 is usual
STEPS = 64  # normalizers, pre-tokenizers or decoders in a row
EXPANSION = 4096  # bytes that these may make of one byte; SentencePiece's make 12
EXPANDED_TEXT = 1 << 26  # bytes that they may make of one text; each costs about 40 in memory
DECODED_TOKEN = 1 << 16  # bytes that decoders may make of one token
PATTERN_CHARACTERS = 1 << 16  # of a regular expression
PATTERN_DEPTH = 32  # groups in groups
PATTERN_REPEATS = 1000  # as which one counted repetition may be written
PATTERN_TRIES = 64  # ways to match one place, where a text is not longer for it

# Generation

SEQUENCES = 1024  # beams or sequences of one prompt that a file may ask for; a call may ask for more
GUESSES = 1024  # tokens guessed in one step: so much longer are a ring and a step
END_IDS = 1024  # ids that end a row: beams keep so many more candidates
STOP_STRINGS = 1024  # texts that end a row: each is looked for after every token
STOP_CHARACTERS = 4096  # of one of them
WORDS = 1 << 14  # forbidden words, biased sequences, suppressed ids: each is looked at after every token
WORD_IDS = 256  # ids of one of them
LENGTH_PENALTY = 32  # the exponent of a length: 2^20 tokens to this power are still a float64


def check(count: int, limit: int, *, what: str, where: str, error: type[MistralError] = LimitExceededError) -> None:
    """Raise `error` where `count` is above a limit; `what` is the plural of what is counted."""
    if count > limit:
        raise error(f"{where}: {count} {what}; at most {limit} are accepted.")
