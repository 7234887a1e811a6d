"""The loop of a training and a run's directory, with a learner of NumPy: resumed to the bit, ended early, refused."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import (
    ConfigError,
    CorruptCheckpointError,
    MissingTensorsError,
    NonFiniteLossError,
    OutputBusyError,
    OutputExistsError,
    ShapeMismatchError,
)
from mistral_core.learning import Examples, Feed
from mistral_core.reference.optim import AdamW, Moments, adamw_step, clipped, global_norm
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.training import Measure, StepOutcome, TrainingSettings, curves, train
from mistral_core.training.learner import MOMENTS, check_arrays

SETTINGS = TrainingSettings(rate=0.3, epochs=3, warmup=0.2)
WORDS = ["Emma", "was", "not", "at all", "pleased", "with", "what", "Harriet", "had", "said", "of", "the evening"]


class Bigrams:
    """A learner that needs no framework: the score of each token after each of a few classes of tokens."""

    def __init__(self, settings, *, spoil=None):
        self.settings, self.spoil = settings, spoil
        self.weights = {"table": np.zeros((8, 8))}
        self.moments = Moments.zeros(self.weights)
        self.saved = []

    def step(self, batches, *, items, rate, number):
        losses, total = [], np.zeros((8, 8))
        for batch in batches:
            loss, gradient = self._loss(batch)
            losses.append(loss / items)
            total += gradient / items
        if self.spoil == number:
            losses[-1] = math.nan
        outcome = StepOutcome(tuple(losses), global_norm({"table": total}))
        if outcome.is_finite:
            rule = AdamW(self.settings.b1, self.settings.b2, self.settings.eps, self.settings.weight_decay)
            self.weights, self.moments = adamw_step(
                self.weights, clipped({"table": total}, 1.0), self.moments, rate=rate, rule=rule
            )
            self.weights = {"table": self.weights["table"].astype(np.float32)}
            first, second = (moment["table"].astype(np.float32) for moment in self.moments[:2])
            self.moments = Moments({"table": first}, {"table": second}, self.moments.steps)
        return outcome

    def measure(self, batch):
        return Measure(self._loss(batch)[0], None)

    def arrays(self):
        trees = self.weights, self.moments.first, self.moments.second
        return {
            f"{moment}.table": tree["table"].astype(np.float32) for moment, tree in zip(MOMENTS, trees, strict=True)
        }

    def restore(self, arrays, *, steps):
        check_arrays(arrays, {"table": (8, 8)})
        self.weights = {"table": arrays["weights.table"]}
        self.moments = Moments({"table": arrays["first.table"]}, {"table": arrays["second.table"]}, steps)

    def save(self, directory):
        self.saved.append(os.path.basename(directory))
        os.makedirs(directory, exist_ok=True)
        np.save(os.path.join(directory, "table.npy"), self.weights["table"])

    def _loss(self, batch):
        ids, labels = batch["input_ids"][:, :-1] % 8, batch["labels"][:, 1:]
        counted = labels >= 0
        before, after = ids[counted], labels[counted] % 8
        scores = self.weights["table"][before]
        wide = np.exp(scores - scores.max(-1, keepdims=True))
        share = wide / wide.sum(-1, keepdims=True)
        gradient = np.zeros((8, 8))
        np.add.at(gradient, before, share - np.eye(8)[after])
        return float(-np.log(share[np.arange(len(after)), after]).sum()), gradient


@pytest.fixture(scope="module")
def tokenizer():
    return MistralTokenizer.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def examples(tokenizer, tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(2, 14, 30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Examples(path, tokenizer, length=32)


def feed(examples):
    return Feed(examples, rows=1, accumulate=2, seed=1)


def lines(directory):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def run(examples, directory, settings=SETTINGS, learner=None, **options):
    learner = Bigrams(settings) if learner is None else learner
    return train(learner, feed(examples), directory, settings=settings, validation=examples, **options)


def test_a_run_keeps_a_record(examples, tmp_path):
    result = run(examples, tmp_path / "run", about={"model": "bigrams"}, made_with={"numpy": np.__version__})
    total = feed(examples).count_steps(epochs=3)
    assert (result.steps, result.ended) == (total, "all epochs")
    found = lines(tmp_path / "run")
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, total + 1))
    assert [line["rate"] for line in steps] == [SETTINGS.rates(total)(step) for step in range(total)]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    measured = [line for line in found if "validation_loss" in line]
    assert len(measured) == 3
    assert measured[-1]["step"] == total
    assert result.best_loss == min(line["validation_loss"] for line in measured)
    tokens = sum(line["tokens"] for line in steps)
    assert tokens == 3 * examples.counts().tokens
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["about"] == {"model": "bigrams"}
    assert about["settings"] == SETTINGS.to_dict()
    assert {"best", "final", "last", "curves.html", "curves.png"} <= set(os.listdir(tmp_path / "run"))
    assert (tmp_path / "run/final/tokenizer.json").exists()


@pytest.mark.parametrize("stops", [(1,), (2, 3), (4,), (5, 6, 7)])
def test_a_run_that_is_stopped_and_resumed_is_the_run(examples, tmp_path, stops):
    settings = TrainingSettings(rate=0.05, epochs=3, evaluate_every=2)
    run(examples, tmp_path / "whole", settings)
    for stop in stops:
        asked = iter(range(stop - _done(tmp_path / "parts"), -1, -1))
        result = run(examples, tmp_path / "parts", settings, resume=True, stop=lambda asked=asked: next(asked) <= 1)
        assert result.ended == "stopped"
    assert run(examples, tmp_path / "parts", settings, resume=True).ended == "all epochs"
    _same(tmp_path / "whole", tmp_path / "parts")


def _done(directory):
    path = directory / "last" / "progress.json"
    return json.loads(path.read_text())["steps"] if path.exists() else 0


def _same(one, other):
    assert lines(one) == lines(other)
    for name in ("final", "best"):
        assert np.array_equal(np.load(one / name / "table.npy"), np.load(other / name / "table.npy")), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_is_killed_goes_on_from_what_was_kept(examples, tmp_path, at):
    settings = TrainingSettings(rate=0.05, epochs=3, evaluate_every=2)

    def kill(line):
        if line["step"] == at and "validation_loss" not in line:
            raise Killed

    run(examples, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        run(examples, tmp_path / "parts", settings, told=kill)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that was being written
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line \d+") as warned:
        result = run(examples, tmp_path / "parts", settings, resume=True)
    assert len(warned) == 1
    assert result.ended == "all epochs"
    _same(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_while_a_run_is_resumed_loses_no_line(examples, tmp_path, monkeypatch):
    settings = TrainingSettings(rate=0.05, epochs=3, evaluate_every=2)

    def kill(*_):
        raise Killed

    with pytest.raises(Killed):
        run(examples, tmp_path / "run", settings, told=lambda line: kill() if line["step"] == 3 else None)
    kept = (tmp_path / "run/metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]  # of two steps and a measure
    monkeypatch.setattr("mistral_core.training.record.files.write_at", kill)
    with pytest.raises(Killed):
        run(examples, tmp_path / "run", settings, resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == b"".join(kept)


def test_curves_are_drawn_now_and_then(examples, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("mistral_core.training.record.curves.png", lambda charts: drawn.append(charts) or b"")
    settings = TrainingSettings(rate=0.3, epochs=20, save_every=1)
    steps = train(Bigrams(settings), feed(examples), tmp_path / "run", settings=settings).steps
    assert len(drawn) < steps / 2
    assert len(drawn[-1][0].curves[0].steps) == steps


def test_a_run_that_is_done_is_not_done_again(examples, tmp_path):
    run(examples, tmp_path / "run")
    before = lines(tmp_path / "run")
    learner = Bigrams(SETTINGS)
    assert run(examples, tmp_path / "run", learner=learner, resume=True).ended == "all epochs"
    assert lines(tmp_path / "run") == before
    assert learner.saved == ["final"]


def test_training_ends_where_patience_does(examples, tmp_path):
    settings = TrainingSettings(rate=0.0, epochs=50, patience=2)
    result = run(examples, tmp_path / "run", settings)
    assert result.ended == "no lower validation loss"
    measured = [line for line in lines(tmp_path / "run") if "validation_loss" in line]
    assert len(measured) == 3
    assert result.best_step == measured[0]["step"]
    again = run(examples, tmp_path / "run", settings, resume=True)
    assert again.steps == result.steps


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_lines(examples, tmp_path):
    learner, settings = Bigrams(SETTINGS, spoil=3), TrainingSettings(rate=0.05, epochs=3, save_every=2)
    seen = []
    original = learner.step
    learner.step = lambda *given, **options: (
        seen.append(learner.weights["table"].copy()),
        original(*given, **options),
    )[1]
    with pytest.raises(NonFiniteLossError, match="in step 4 the loss is nan, of the examples in lines") as raised:
        run(examples, tmp_path / "run", settings, learner)
    assert np.array_equal(learner.weights["table"], seen[-1])
    assert _done(tmp_path / "run") == 2
    assert "last holds step 2" in str(raised.value)
    steps = list(feed(examples).steps(epochs=2))
    wanted = sorted(line for row in steps[3].batches[-1].lines for line in row)
    assert f"lines {', '.join(map(str, wanted))};" in str(raised.value)


def test_a_validation_loss_that_is_no_number_ends_the_run(examples, tmp_path):
    learner = Bigrams(SETTINGS)
    learner.measure = lambda batch: Measure(math.nan, None)
    with pytest.raises(NonFiniteLossError, match=r"after step \d+ the validation loss is nan; nothing was kept before"):
        run(examples, tmp_path / "run", learner=learner)


def test_gradients_that_are_no_number_name_all_lines(examples, tmp_path):
    learner = Bigrams(SETTINGS)
    learner.step = lambda batches, **_: StepOutcome((1.0,) * len(batches), math.inf)
    with pytest.raises(NonFiniteLossError, match="the norm of the gradients is inf"):
        run(examples, tmp_path / "run", learner=learner)


def test_a_directory_that_has_something_is_refused(examples, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="must be new"):
        run(examples, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_a_run_of_something_else_is_not_resumed(examples, tmp_path):
    run(examples, tmp_path / "run", about={"model": "one"})
    with pytest.raises(ConfigError, match="something else: about.model 'one' then, 'two' now; give"):
        run(examples, tmp_path / "run", about={"model": "two"}, resume=True)
    with pytest.raises(ConfigError, match="settings.epochs 3 then, 1 now; settings.rate 0.3 then, 1.0 now"):
        run(examples, tmp_path / "run", TrainingSettings(rate=1.0), about={"model": "one"}, resume=True)


def test_two_processes_do_not_train_into_one_directory(examples, tmp_path):
    def again(_):
        with pytest.raises(OutputBusyError, match="another process"):
            run(examples, tmp_path / "run", resume=True)
        raise Killed

    with pytest.raises(Killed):
        run(examples, tmp_path / "run", told=again)


@pytest.mark.parametrize("damage", ["missing", "text", "field"])
def test_a_state_that_is_damaged_is_told(examples, tmp_path, damage):
    run(examples, tmp_path / "run")
    last = tmp_path / "run/last"
    if damage == "missing":
        (last / "learner.safetensors").unlink()
    elif damage == "text":
        (last / "progress.json").write_text("{")
    else:
        state = json.loads((last / "progress.json").read_text())
        (last / "progress.json").write_text(json.dumps({**state, "steps": "many"}))
    with pytest.raises((CorruptCheckpointError, OSError)) as raised:
        run(examples, tmp_path / "run", resume=True)
    assert str(last) in str(raised.value)


def test_arrays_of_another_model_are_refused():
    arrays = {f"{moment}.table": np.zeros((8, 8), np.float32) for moment in MOMENTS}
    check_arrays(arrays, {"table": (8, 8)})
    with pytest.raises(MissingTensorsError, match="3 tensors are missing .*weights.other.*, and 3 are of nothing"):
        check_arrays(arrays, {"other": (8, 8)})
    with pytest.raises(ShapeMismatchError, match=r"must be \[8, 9\], got \[8, 8\]"):
        check_arrays(arrays, {"table": (8, 9)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", -1.0), ("rate", math.nan), ("epochs", 0), ("epochs", None), ("schedule", "sine"), ("warmup", 1.5),
        ("floor", -0.1), ("b1", 1.0), ("eps", 0.0), ("clip", 0.0), ("clip", "much"), ("beta", 0), ("seed", -1),
        ("evaluate_every", 0), ("patience", 1.5), ("weight_decay", math.inf),
    ],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainingSettings(**{"rate": 1e-3, name: value})


def test_curves_are_drawn_of_many_steps_and_of_one():
    many = [
        {"step": step, "loss": 3 / step, "rate": 1e-3, "norm": 1.0, "tokens": 100, "seconds": 0.5}
        for step in range(1, 5001)
    ]
    charts = curves.charts([*many, {"step": 5000, "validation_loss": 0.5, "validation_right": 0.75}])
    assert [chart.title for chart in charts] == ["loss", "right, share", "learning rate", "tokens a second"]
    loss = charts[0].curves[0]
    assert len(loss.steps) <= curves.POINTS
    assert np.isclose(loss.values.mean(), np.mean([line["loss"] for line in many]), rtol=0.01)
    assert set(charts[3].curves[0].values) == {200.0}
    for chart in charts:
        for curve in chart.curves:
            x, y = np.array(chart.points(curve)).T
            assert ((x >= curves.LEFT) & (x <= curves.WIDTH - curves.RIGHT)).all()
            assert ((y >= curves.TOP) & (y <= curves.HEIGHT - curves.BOTTOM)).all()
    page = curves.page(charts, "run <1>")
    assert "run &lt;1&gt;" in page
    assert page.count("<polyline") == 5
    assert "http" not in page.replace("http-equiv", "")
    assert curves.png(charts)[:4] == b"\x89PNG"
    assert "No step yet" in curves.page(curves.charts([]), "run")
    assert curves.png(curves.charts(many[:1]))[:4] == b"\x89PNG"
