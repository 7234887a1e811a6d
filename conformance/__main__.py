"""`python -m conformance`: run the suite on the installed backends and print who agrees with the specification."""

from __future__ import annotations

import argparse
import sys

from mistral_core import backend, devices


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where everything agrees, 1 where something does not, 2 where nothing could be run."""
    backend.be_polite()
    from mistral_core.errors import ConfigError, UnsupportedFeatureError

    from . import adapters, report, suite
    from .compare import Comparison

    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--backend", action="append", choices=adapters.NAMES, help="default: all installed")
    dtypes = (*suite.DTYPES, *suite.ASKED_FOR)
    parser.add_argument("--dtype", action="append", choices=dtypes, help=f"default: {', '.join(suite.DTYPES)}")
    parser.add_argument("--attention", action="append", help="only these attention implementations")
    parser.add_argument(
        "--device", default=devices.CPU, help="where models and arrays are put: cuda, ...; default: cpu"
    )
    parser.add_argument("--check", default="", help="only checks whose name holds this")
    parser.add_argument("--json", action="store_true", help="every comparison as JSON")
    options = parser.parse_args(argv)

    found: list[Comparison] = []
    for name in options.backend or adapters.NAMES:
        try:
            asked = (name,), tuple(options.dtype or suite.DTYPES), tuple(options.attention or ())
            chosen = list(suite.subjects(*asked, device=options.device))
        except ImportError as error:
            print(f"conformance: {name} is not installed ({error})", file=sys.stderr)
            continue
        except (ConfigError, UnsupportedFeatureError) as error:
            print(f"conformance: {name}: {error}", file=sys.stderr)
            return 2
        for subject in chosen:
            print(f"conformance: {'/'.join(subject.key)}", file=sys.stderr)
            for check in suite.CHECKS.values():
                if options.check in check.name and check.suits(subject.implementation, subject.dtype):
                    found += check.run(subject)
    if not found:
        print("conformance: nothing was compared; see --help", file=sys.stderr)
        return 2
    print(report.as_json(found) if options.json else report.table(report.worst(found)))
    failed = sum(not item.passed for item in found)
    print(f"{len(found) - failed} comparisons passed, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
