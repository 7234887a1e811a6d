"""The three backends are mirrors: compared by ast, with no framework installed."""

from __future__ import annotations

import ast
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL, OTHERS = "mistral_torch", ("mistral_flax", "mistral_tf")

# Each exception is a rule, with its reason.
CALL = {"forward": "call", "__call__": "call"}
"""The method a framework calls has the framework's name."""
FRAMEWORK_PARAMETERS = {
    "rngs": "JAX has no global randomness",
    "training": "Keras passes the mode, torch keeps it",
    "seed": "TensorFlow's way to say how weights are dropped",
    "dtype": "torch models are cast, JAX and Keras are built in a dtype",
    "param_dtype": "JAX: parameters in another dtype than the computation; Keras has policies, torch autocast",
    "name": "Keras names its layers",
    "initializer": "Keras' way to say how weights begin",
    "std": "JAX's",
    "bias": "our own Linear; torch has one",
    "mesh": "JAX: the devices, torch: the processes that a model is cut over as it is loaded",
    "rules": "JAX: which axes of a mesh cut what",
    "device": "JAX and TensorFlow place arrays by themselves",
    "formula": "JAX and TensorFlow: what is differentiated, and in a file; torch's gradients do without C",
    "sample_weight": "Keras' fit takes them",
    "after": "JAX: what an operation waits for; torch runs one after another, TensorFlow has control dependencies",
}
OWN_NAMES = {
    "Layer": "Keras: what our layers share (dtypes left alone)",
    "Linear": "torch has it, in our layout",
    "Embedding": "torch has it",
    "converted": "torch: one head for many steps; what JAX and TensorFlow compile reads 16-bit weights as they are",
    "as_floats": "the loss from chunks of logits, with gradients of its own; JAX differentiates what a chunk computes",
    "Factors": "Keras' fit takes the loss from what a call made",
    "silu": "torch rounds once by itself",
    "gated": "torch: what C computes in one pass is a function",
    "tie_weights": "torch modules share a tensor; the others look it up (Embedding.as_linear)",
    "initialise": "torch initialises after construction",
    "functional": "JAX: the argument params",
    "as_program": "JAX: compiled functions are found by a model's graph",
    "bind": "JAX: the argument params",
    "params": "JAX: the parameters as a pytree",
    "dropout_keys": "JAX: keys for dropout",
    "default_initializer": "Keras: what weights begin as",
    "device": "torch models are on a device",
    "dtype": "Keras layers have it already",
    "attend_sdpa": "the fused kernels differ by framework",
    "attend_flex": "the fused kernels differ by framework",
    "attend_flash": "the fused kernels differ by framework",
    "attend_dot_product": "the fused kernels differ by framework",
    "attend_splash": "the fused kernels differ by framework",
    "rms_norm": "torch: a model that is cut over processes holds the weight in another way",
    "config_here": "torch: each process computes with heads of its own; JAX computes with all, wherever they are",
    "default": "JAX: the kernel of a device",
    "move": "JAX: packed matrices over a mesh; torch modules move by themselves",
    "prepare_inputs_for_generation": "torch: peft asks for it",
    "name_or_path": "torch: an attribute of its own, as peft reads it from the instance",
    "param_dtype": "JAX: see the parameter",
    "is_mapped": "torch: torch.func",
    "usable": "JAX and TensorFlow: whether a program may call C; torch asks of tensors (unwatched)",
    "is_on_cpu": "TensorFlow: see usable",
    "operations": "TensorFlow: what its library has; JAX calls C by name",
    "Told": "torch knows what its orders are before it calls C; JAX and TensorFlow hand them over in their programs",
    "told_of": "torch: see Told",
    "may_be_for_c": "torch: see Told; a model asks before it makes masks",
    "unwatched": "torch runs C in place of an operation; JAX and TensorFlow have it as an operation",
    "transformed": "torch: see unwatched",
    "learnt": "torch: see unwatched",
    "openmp": "torch has threads that C takes; XLA and TensorFlow keep theirs",
    "sgemm": "torch has a product that C asks for many rows; XLA and TensorFlow export none",
    "widened_product": "torch would copy a bfloat16 matrix for a float32 sum; JAX and TensorFlow are told of the sum",
    "has_values": "torch computes at once, and may look at values; JAX and TensorFlow decide in their programs",
    "without_dropout": "torch modules know whether they train; JAX and TensorFlow are told in each call",
    "over_replicas": "TensorFlow: a strategy's replicas; torch and JAX say how many items a step has",
    "one_by_one": "JAX: one of two ways to run the layers (scan.py)",
    "dropout_seeds": "TensorFlow: seeds for dropout",
    "replace_weight": "Keras tracks variables",
    "looked": "torch looks at a text's order once for blocks and for bands",
    "extra_repr": "NNX shows a module's attributes by itself",
    "Packed": "JAX: a kind of Variable that optimizers and filters pass by",
    "portable": "TensorFlow: what is saved, or compiled by XLA, has no operations of ours",
    "Frozen": "JAX: a kind of Variable that does not train; torch and Keras have flags for it",
    "adapters_config": "Keras' files say how a model is made",
    "add_from_config": "Keras' files say how a model is made",
    "is_of_adapter": "Keras' files say how a model is made",
    "drawn_seed": "TensorFlow: seeds for dropout, the same when a layer is computed again",
    "drawn_from": "TensorFlow: seeds for dropout, of one that a step of training has; torch and JAX take it",
    "fresh_seed": "TensorFlow: seeds for dropout",
    "__call__": "Keras: lists and NumPy become tensors before Keras looks at them",
}
OWN_FILES = {
    "compiled.py": "torch's compiler is asked for, function by function; JAX and TensorFlow always compile",
    "between.py": "torch runs each operation by itself; XLA makes one pass of a norm, a rotation and a gate",
    "bands.py": "torch's kernel of a CPU tells the sums by which pieces are put together; the others have none",
    "whole_call.py": "torch calls C for all layers of a text; what JAX and TensorFlow compile is one program already",
    "tiles.py": "torch makes each array as it comes to it; XLA and TensorFlow plan their memory",
    "compat.py": "each framework has other guests: torch trainers and adapters, Flax and TF old names of classes",
    "foreign_cache.py": "torch: decode loops and adapters bring transformers' caches; its Flax and TF ones are gone",
    "outputs.py": "torch's clients ask for dictionaries; JAX and TensorFlow take core's named tuples as they are",
    "sharding.py": "JAX cuts arrays over meshes, torch over processes; TensorFlow has strategies",
    "dispatch.py": "torch: accelerate's hooks move what parts of a model on several devices meet",
    "processes.py": "torch and JAX: what several processes hold parts of; TensorFlow has strategies",
    "strategies.py": "TensorFlow: several devices are a strategy, under which a model is made",
    "scan.py": "JAX compiles every layer anew unless it scans",
    "programs.py": "JAX compiles each operation by itself, unless it is told what belongs together",
    "optimizers.py": "Keras: AdamW adds its epsilon elsewhere than PyTorch's and optax' do",
    "fit.py": "Keras models train themselves",
    "saving.py": "Keras and TensorFlow have files of their own, and look for what to write in them",
    "foreign_calls.py": "what transformers' and peft's PyTorch clients hand to generate",
    "pickles.py": "PyTorch's own files, which only torch may read; a format of checkpoints, no part of the backend",
    "traces.py": "TensorFlow: what it traced stays as it was; torch guards it, JAX finds it by its graph",
}

OWN_EXPORTS = {
    "parallelize": "torch: a mesh of processes",
    "shard": "JAX: a mesh of devices",
    "portable": "TensorFlow: what is saved has no operations of ours",
}


def files(package: str) -> set[str]:
    return {path.name for path in (ROOT / package).glob("*.py")} - {*OWN_FILES}


def tree(package: str, file: str) -> ast.Module:
    return ast.parse((ROOT / package / file).read_text())


def public(body: list[ast.stmt], inside: str = "") -> dict[str, ast.stmt]:
    """Public classes, functions and methods of a module in order, the framework's own left out."""
    found = {}
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        name = node.name
        special = inside and name in CALL and not (name == "__call__" and inside == "PreTrainedModel")
        if name in OWN_NAMES and not special:
            continue
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        found[f"{inside}.{CALL.get(name, name)}" if inside else name] = node
        if isinstance(node, ast.ClassDef):
            found |= public(node.body, name)
    return found


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """(name, kind, default) of each parameter but the framework's own."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults]
    rows = [(a.arg, "positional", d) for a, d in zip(positional, defaults, strict=True)]
    rows += [(a.arg, "keyword", d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    rows += [(a.arg, "rest", None) for a in (arguments.vararg, arguments.kwarg) if a is not None]
    own = {*FRAMEWORK_PARAMETERS} - ({"dtype", "seed"} if function.name == "from_pretrained" else set())
    attention = "attn_implementation"  # each framework has its own fastest
    return [
        (name, kind, "" if default is None or name == attention else ast.unparse(default))
        for name, kind, default in rows
        if name not in own
    ]


def first_line(node: ast.stmt) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


SAME_WORDS = (
    "mistral_torch",
    "mistral_flax",
    "mistral_tf",
    "tensor",
    "array",
    "int64",
    "int32",
    "torch",
    "JAX",
    "TensorFlow",
    "jax",
)


def without_framework(line: str) -> str:
    """A docstring line in which the words for arrays and frameworks are one word."""
    for word in SAME_WORDS:
        line = line.replace(f"{word}s", "*").replace(word, "*")
    return line


@pytest.mark.parametrize("package", OTHERS)
def test_same_files(package):
    assert files(package) == files(MODEL)


SHARED = sorted(files(MODEL) - {"__init__.py", "arrays.py"})


@pytest.mark.parametrize("package", OTHERS)
@pytest.mark.parametrize("file", SHARED)
def test_same_names_in_the_same_order(package, file):
    assert list(public(tree(package, file).body)) == list(public(tree(MODEL, file).body))


@pytest.mark.parametrize("package", OTHERS)
@pytest.mark.parametrize("file", SHARED)
def test_same_parameters_and_defaults(package, file):
    ours, theirs = public(tree(MODEL, file).body), public(tree(package, file).body)
    compared = 0
    for name, node in ours.items():
        if isinstance(node, ast.FunctionDef):
            assert parameters(theirs[name]) == parameters(node), name
            compared += 1
    assert compared or file == "backend.py"


@pytest.mark.parametrize("package", OTHERS)
@pytest.mark.parametrize("file", SHARED)
def test_same_first_docstring_line(package, file):
    ours, theirs = tree(MODEL, file), tree(package, file)
    assert without_framework(first_line(theirs)) == without_framework(first_line(ours))
    for name, node in public(ours.body).items():
        assert without_framework(first_line(public(theirs.body)[name])) == without_framework(first_line(node)), name


@pytest.mark.parametrize("package", OTHERS)
def test_the_same_public_names_are_exported(package):
    def exported(name: str) -> list[str]:
        assignments = [n for n in tree(name, "__init__.py").body if isinstance(n, ast.Assign)]
        return next(ast.literal_eval(n.value) for n in assignments if n.targets[0].id == "__all__")  # type: ignore[attr-defined]

    ours, theirs = ([name for name in exported(each) if name not in OWN_EXPORTS] for each in (MODEL, package))
    assert theirs == ours


LAYOUT = {tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}  # fmt: skip


def code_lines(package: str, file: str) -> int:
    """How many lines of a file hold code: neither blank, nor comments, nor strings that stand alone."""
    stated = [node for node in ast.walk(tree(package, file)) if isinstance(node, ast.Expr)]
    texts = [node for node in stated if isinstance(node.value, ast.Constant)]
    alone = {number for text in texts for number in range(text.lineno, text.end_lineno + 1)}
    with (ROOT / package / file).open("rb") as source:
        held = [token for token in tokenize.tokenize(source.readline) if token.type not in LAYOUT]
    return len({number for token in held for number in range(token.start[0], token.end[0] + 1)} - alone)


@pytest.mark.parametrize("package", [MODEL, *OTHERS])
def test_a_model_is_read_in_one_sitting(package):
    """Formulas and the model in at most 300 lines of code: what is neither has a file of its own."""
    assert code_lines(package, "layers.py") + code_lines(package, "model.py") <= 300
