"""Make what transformers' own pipelines say of tests/pipeline_cases.py.

    python3 -m venv four && four/bin/pip install transformers==4.56.2 torch==2.13.0 numpy ml_dtypes safetensors
    python3 -m venv five && five/bin/pip install transformers==5.23.0 torch==2.13.0 numpy ml_dtypes safetensors
    cd tests/data/pipelines
    for peer in four five; do PYTHONPATH=../../..:../.. ../../../$peer/bin/python make_pipelines.py; done

Writes transformers-4.json and transformers-5.json: versions, and the result of each case, null where the peer has no
such pipeline. Weights are drawn by NumPy from seeds, so both peers and we have the same.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from pipeline_cases import CASES, save

HERE = Path(__file__).parent


def plain(value: object) -> object:
    """Results as JSON has them; scores to nine digits."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.9g}")
    return int(value) if isinstance(value, np.integer) else value


def answers(directory: Path) -> list[object]:
    """The result of each case."""
    found = []
    for (task, inputs, options), path in ((case, directory / case[0]) for case in CASES):
        try:
            pipe = transformers.pipeline(task, model=str(path), device="cpu", dtype=torch.float32)
        except KeyError:  # transformers 5 answers no questions
            found.append(None)
            continue
        given = {**inputs, **options} if task == "question-answering" else options
        found.append(plain(pipe(**given) if task == "question-answering" else pipe(inputs, **given)))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        results = answers(Path(directory))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    name = f"transformers-{transformers.__version__.partition('.')[0]}.json"
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in results)  # one for each case
    (HERE / name).write_text(f'{{"versions": "{versions}", "results": [\n{lines}\n]}}\n')
