"""From a file of examples to batches, the same for every framework: read, formatted, packed, shuffled, resumed.

from mistral_core.learning import Examples, Feed

examples = Examples("chats.jsonl", tokenizer, length=2048)
for step in Feed(examples, rows=8, accumulate=4, seed=0).steps(epochs=2):
    for batch in step.batches:
        model(**batch.arguments(), num_items_in_batch=step.num_items_in_batch).loss
"""

from .batches import Batch as Batch
from .batches import LearningStep as LearningStep
from .examples import CutExample as CutExample
from .examples import ExampleCounts as ExampleCounts
from .examples import Examples as Examples
from .examples import kind_of_file as kind_of_file
from .examples import label_names as label_names
from .feed import Feed as Feed
from .formatting import Example as Example
from .schedule import Schedule as Schedule
