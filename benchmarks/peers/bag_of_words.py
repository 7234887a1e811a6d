"""Logistic regression on a bag of words: the best of a grid by cross-validation, and how much it gets right."""

from __future__ import annotations

import json
from pathlib import Path

from ..common import say, task


def main() -> None:
    """Learn from one .jsonl of text and label, and tell how much of another is right."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline

    asked = task()
    learnt, others = (
        [json.loads(line) for line in Path(asked[name]).read_text().splitlines()] for name in ("learnt", "others")
    )
    grid = {
        "words": [CountVectorizer(binary=True), TfidfVectorizer(sublinear_tf=True)],
        "classes__C": [0.3, 1, 3, 10, 30],
    }
    steps = Pipeline([("words", CountVectorizer()), ("classes", LogisticRegression(max_iter=2000))])
    search = GridSearchCV(steps, grid, cv=3).fit(*_parts(learnt))
    best = search.best_params_
    told = f"{type(best['words']).__name__}, C = {best['classes__C']}"
    say({"right": float(search.score(*_parts(others))), "best": told}, "scikit-learn")


def _parts(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    return [row["text"] for row in rows], [row["label"] for row in rows]


if __name__ == "__main__":
    main()
