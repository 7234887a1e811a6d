"""The reference against transformers 5's own Mistral in true float64 (tests/data/golden/make_golden.py).

Three comparisons. With the oracle's float64 angles the two are one function, computed in another order. With
the contract's float32 angles they are one function too, where the oracle was run with these. And with the
contract's angles against the oracle's float64 angles they differ by what float32 angles cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.weights import checksum, random_parameters
from mistral_core.config import MistralConfig, rope
from mistral_core.parameters import HEADS
from mistral_core.reference import heads, ops

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
FILES = sorted(GOLDEN.glob("*.npz"))
CONTRACT = [path for path in FILES if "logits_float32_angles" in np.load(path).files]

SAME_FUNCTION = 128 * float(np.finfo(np.float64).eps)
"""Of the largest |value| of an output: the same sums of at most 96 products, in another order, through 3
layers. Measured: 23 eps at most."""

ANGLES_COST = 8 * float(np.finfo(np.float32).eps)
"""Times the largest position, for logits up to 13. An angle p f, f at most 1, is rounded twice, so off by at
most p eps (float32); the weights decide how far that moves the logits. Measured: 0.8 p eps at most."""

INPUTS = ("attention_mask", "position_ids", "document_ids", "labels", "start_positions", "end_positions")
OUTPUTS = ("logits", "start_logits", "end_logits", "loss")
RUN = {
    "MistralForCausalLM": heads.causal_lm,
    "MistralForSequenceClassification": heads.sequence_classification,
    "MistralForTokenClassification": heads.token_classification,
    "MistralForQuestionAnswering": heads.question_answering,
}


def names(files: list[Path]) -> list[str]:
    return [path.stem for path in files]


class Golden:
    """One file: the case, and the reference's answer to it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.data = {key: file[key] for key in file.files}
        self.config = MistralConfig.from_dict(json.loads(str(self.data["config"])), strict=True)
        self.architecture = str(self.data["architecture"])
        self.parameters = random_parameters(self.config, self.architecture, seed=int(self.data["seed"]))
        self.real = self.data["compare"]

    def run(self) -> Any:
        inputs = {name: self.data[name] for name in INPUTS if name in self.data}
        return RUN[self.architecture](self.config, self.parameters, self.data["input_ids"], **inputs)

    def comparable(self, values: np.ndarray) -> np.ndarray:
        """Of an output per token, the real tokens; of any other, all."""
        return values[self.real] if values.shape[:2] == self.real.shape else values

    def angles_of_oracle(self, position_BT: np.ndarray, config: MistralConfig) -> np.ndarray:
        return position_BT[..., None] * self.data["inverse_frequency"]


def assert_close(found: Any, expected: np.ndarray, bound: float, what: str) -> None:
    found = np.asarray(found)
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max()
    assert error <= bound, f"{what}: off by {error:.3g}, at most {bound:.3g} was expected"


@pytest.fixture(params=FILES, ids=names(FILES))
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_there_is_a_case_of_every_head() -> None:
    assert {Golden(path).architecture for path in FILES} == set(HEADS) - {"MistralModel"}


def test_weights_are_those_of_the_oracle(golden: Golden) -> None:
    assert checksum(golden.parameters) == golden.data["weights_crc"], "NumPy or conformance/weights.py changed"


def test_rotary_table_is_the_oracles_rounded_once(golden: Golden) -> None:
    table = rope.rotary_table(golden.config)
    expected = golden.data["inverse_frequency"].astype(np.float32)
    np.testing.assert_array_equal(table.inverse_frequency, expected)
    assert table.attention_factor == golden.data["attention_factor"]


def test_same_function_with_float64_angles(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "rotary_angles", golden.angles_of_oracle)
    out = golden.run()
    for name in OUTPUTS:
        if name in golden.data:
            found, expected = (golden.comparable(np.asarray(x)) for x in (out[name], golden.data[name]))
            assert_close(found, expected, SAME_FUNCTION * np.abs(expected).max(), name)
    if "hidden_1" in golden.data:
        found, expected = (golden.comparable(x) for x in (out.hidden_states[1], golden.data["hidden_1"]))
        assert_close(found, expected, SAME_FUNCTION * np.abs(expected).max(), "hidden_1")


@pytest.mark.parametrize("path", CONTRACT, ids=names(CONTRACT))
def test_same_function_with_the_contracts_angles(path: Path) -> None:
    golden = Golden(path)
    expected = golden.data["logits_float32_angles"]
    assert_close(golden.run().logits, expected, SAME_FUNCTION * np.abs(expected).max(), "logits")


def test_what_float32_angles_cost(golden: Golden) -> None:
    out = golden.run()
    positions = golden.data.get("position_ids", np.array(golden.real.shape[1] - 1))
    bound = ANGLES_COST * positions.max()
    for name in set(OUTPUTS) & set(golden.data):
        found, expected = (golden.comparable(np.asarray(x)) for x in (out[name], golden.data[name]))
        assert_close(found, expected, bound, name)
