"""How a model learns in any framework: settings, what a training asks of a framework, the loop, and a run's directory.

from mistral_core.learning import Examples, Feed
from mistral_core.training import TrainingSettings, train
from mistral_torch.train import Learner

settings = TrainingSettings(rate=2e-4, epochs=2)
train(Learner(model, settings), Feed(examples, rows=8), "RUN", settings=settings, validation=held_out)
"""

from .learner import Learner as Learner
from .learner import Measure as Measure
from .learner import StepOutcome as StepOutcome
from .loop import TrainingResult as TrainingResult
from .loop import train as train
from .record import check_new as check_new
from .settings import TrainingSettings as TrainingSettings
