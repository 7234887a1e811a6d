"""A model over processes is the model in one: logits, loss, gradients, steps, text, files; and it is really cut.

Four processes look at every mesh in turn and write down what they find; the tests look at that.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_core.config.presets import TINY
from mistral_core.plan import plan

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]

CASES = {
    "tensor 4": {"sizes": {"tensor": 4}, "K": 4, "all_ways": True},
    "tensor 4, two key/value heads": {"sizes": {"tensor": 4}, "K": 2},
    "tensor 4, one key/value head, tied": {"sizes": {"tensor": 4}, "K": 1, "tied": True},
    "fsdp 4": {"sizes": {"fsdp": 4}, "K": 4},
    "fsdp 2 x tensor 2": {"sizes": {"fsdp": 2, "tensor": 2}, "K": 4, "all_ways": True},
    "fsdp 2 x tensor 2, one key/value head, tied": {"sizes": {"fsdp": 2, "tensor": 2}, "K": 1, "tied": True},
    "data 2 x fsdp 2": {"sizes": {"data": 2, "fsdp": 2}, "K": 2},
}

FURTHER = ("tensor 4", "tensor 4, one key/value head, tied", "fsdp 4")
"""Meshes for which others stand: heads that divide, one that is shared, and whole rows are in those of two axes.

So are all ways to generate, in "fsdp 2 x tensor 2".
"""

PROGRAM = r"""
import contextlib, datetime, json, logging, math, os, sys, tempfile, time
import numpy as np, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import mistral_torch
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import MistralError
from mistral_core.parameters import parameters
from mistral_core.sharding import Sharding
from mistral_core.weights.checkpoint import load
from mistral_core.data import TINY_CHECKPOINT
from mistral_torch import MistralForCausalLM, MistralTokenizer, parallelize, quantize
from mistral_torch.processes import Together
from mistral_torch.sharding import average

CONFIG = TINY.replace(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
    num_hidden_layers=2, eos_token_id=None, sliding_window=6, layer_types=None,
)
IDS = torch.from_numpy(np.random.default_rng(0).integers(1, 96, (4, 9)))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
LABELS = torch.where(MASK == 0, -100, IDS)
LABELS[2:, 1:7] = -100
PACKED = {"int8": (2, {"head": "int8"}), "int4": (4, {"group_size": 16, "head": "int8"}), "nf4": (2, {})}
FOLDER = sys.argv[1]


logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # which collectives are slow


def model_of(config, mesh=None, architecture="MistralForCausalLM"):
    arrays = {name: x.astype(np.float32) for name, x in random_parameters(config, architecture).items()}
    made = getattr(mistral_torch, architecture)(config).load_arrays(arrays)
    return made if mesh is None else parallelize(made, mesh)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def apart(a, b):
    a, b = whole(a).detach().double(), whole(b).detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def furthest(some, others):
    others = dict(others)
    return max(apart(x, others[name]) for name, x in some)


def gradients(model):
    return [(name, p.grad) for name, p in model.named_parameters()]


def raised(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def place_of(mesh):
    "Which of how many copies of the model this process is part of."
    place, copies = 0, 1
    for name, size, at in zip(mesh.mesh_dim_names, mesh.shape, mesh.get_coordinate()):
        if name != "tensor":
            place, copies = place * size + at, copies * size
    return place, copies


def looked_at(name, sizes, K, tied=False, all_ways=False):
    config = CONFIG.replace(num_key_value_heads=K, tie_word_embeddings=tied)
    mesh = dist.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    one, cut, found = model_of(config), model_of(config, mesh), {}
    place, copies = place_of(mesh)
    rows = slice(place * 4 // copies, (place + 1) * 4 // copies)

    held = {name: math.prod(p.to_local().shape) for name, p in cut.named_parameters()}
    found["bytes"] = sum(4 * count for count in held.values())
    found["kinds"] = sorted({type(p).__name__ for p in cut.parameters()})
    found["numbers"] = sum(held.values()) / cut.num_parameters()
    sharding = Sharding.of(config, {"tensor": sizes.get("tensor", 1)})
    wide = [name for name, row in parameters(config) if len(row.axes) == 2]
    found["large"] = max(held[n] * math.prod(sizes.values()) / math.prod(dict(one.named_parameters())[n].shape)
                         for n in wide if not ("k_proj" in n or "v_proj" in n) or K % sizes.get("tensor", 1) == 0)

    with torch.no_grad():
        a, b = (m.eval()(ids, mask, output_attentions=True, output_hidden_states=True)
                for m, ids, mask in ((cut, IDS[rows], MASK[rows]), (one, IDS, MASK)))
    found["logits"] = apart(a.logits, b.logits[rows])
    found["hidden"] = max(apart(x, y[rows]) for x, y in zip(a.hidden_states, b.hidden_states))
    found["attentions"] = max(apart(x, y[rows]) for x, y in zip(a.attentions, b.attentions))
    found["cache"] = [a.past_key_values.keys[0].shape[2], cut.config_here.num_key_value_heads]

    def trained(model, ids, mask, labels, count):
        model.train().zero_grad()
        loss = model(ids, mask, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        return loss.detach()

    count = average((LABELS[rows][:, 1:] != -100).sum(), mesh)
    loss = trained(one, IDS, MASK, LABELS, None)
    found["loss"] = apart(average(trained(cut, IDS[rows], MASK[rows], LABELS[rows], count), mesh), loss)
    found["gradients"] = furthest(gradients(cut), gradients(one))
    found["like"] = [f"{n} {p.grad.placements}" for n, p in cut.named_parameters() if p.grad.placements != p.placements]
    cut.gradient_checkpointing_enable()
    trained(cut, IDS[rows], MASK[rows], LABELS[rows], count)
    cut.gradient_checkpointing_disable()
    found["checkpointed"] = furthest(gradients(cut), gradients(one))
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (cut, one)]
    found["norm"], found["clipped"] = apart(*norms), furthest(gradients(cut), gradients(one))
    for model in (cut, one):
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6).step()
    found["stepped"] = furthest(cut.named_parameters(), one.named_parameters())

    prompt = [IDS[:2, :5], IDS[2:3], IDS[3:, :7], IDS[:1, :3]][place]
    padded = torch.ones_like(prompt)
    padded[0, :2] = 0

    def same(**options):
        "Rows of another length in each copy, and as many new tokens; the noise is that of the first process."
        options = {"max_new_tokens": 7 + 2 * place, **options}
        if options.get("do_sample"):
            torch.manual_seed(dist.get_rank())
            ours = cut.generate(prompt, attention_mask=padded, **options)
            torch.manual_seed(0)
        else:
            ours = cut.generate(prompt, attention_mask=padded, **options)
        return torch.equal(ours, one.generate(prompt, attention_mask=padded, **options))

    ways = {
        "greedy": {}, "sampled": {"do_sample": True}, "full cache": {"cache": "full"}, "beams": {"num_beams": 2},
        "lookup": {"prompt_lookup_num_tokens": 3}, "int8 cache": {"cache_dtype": "int8"},
        "in pieces": {"prefill_chunk_size": 2 + place}, "copies": {"num_return_sequences": 2, "do_sample": True},
    }  # fmt: skip
    found["texts"] = {way: same(**options) for way, options in ways.items() if all_ways or way in ("greedy", "sampled")}
    out = cut.generate(prompt, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    found["looked into"] = [out.attentions[0][0].shape[1], len(out.attentions)]
    found["compile"] = raised(cut.generate, prompt, max_new_tokens=1, compile="on")

    folder = os.path.join(FOLDER, name)
    cut.save_pretrained(folder)
    arrays = dict(load(folder)[1])
    found["saved"] = all(x.tobytes() == whole(p).detach().numpy().tobytes() for n, p in cut.named_parameters()
                         for x in [arrays[n]])
    back = MistralForCausalLM.from_pretrained(folder, mesh=mesh)
    found["loaded"] = all(torch.equal(p.to_local(), dict(cut.named_parameters())[n].to_local()) and p.placements ==
                          dict(cut.named_parameters())[n].placements for n, p in back.named_parameters())
    found["tied"] = back.lm_head.weight is back.model.embed_tokens.weight
    found["again"] = torch.equal(back.generate(prompt, max_new_tokens=4), one.generate(prompt, max_new_tokens=4))
    if dist.get_rank() == 0:
        one.save_pretrained(folder + "-one")
    dist.barrier()
    changed = MistralForCausalLM.from_pretrained(folder + "-one", mesh=mesh, dtype="bfloat16")
    found["dtype"] = sorted({str(p.dtype) for p in changed.parameters()})
    return found


def others():
    "What is looked at once: packed matrices, other classes, models that torch's own functions cut, refusals."
    found, four = {}, dist.init_device_mesh("cpu", (4,), mesh_dim_names=("tensor",))
    two = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tensor"))
    rank = dist.get_rank()
    folder = os.path.join(FOLDER, "packed")
    found["packed"] = {}
    for scheme, (K, options) in PACKED.items():
        one = quantize(model_of(CONFIG.replace(num_key_value_heads=K)), scheme, **options)
        one.eval()
        if rank == 0:
            one.save_pretrained(folder)
        dist.barrier()
        loaded = MistralForCausalLM.from_pretrained(folder, mesh=four)
        after = quantize(model_of(CONFIG.replace(num_key_value_heads=K), four), scheme, **options)
        before = quantize(model_of(CONFIG.replace(num_key_value_heads=K)), scheme, **options)
        each = {"loaded": loaded, "quantized then": after, "quantized before": parallelize(before, four)}
        for name, cut in each.items():
            codes = sum(b.nbytes for n, b in cut.named_buffers()) / sum(b.nbytes for n, b in one.named_buffers())
            x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = x.detach().clone().requires_grad_()
            a, b = cut.eval()(inputs_embeds=x, use_cache=False).logits, one(inputs_embeds=y, use_cache=False).logits
            a.square().sum().backward(), b.square().sum().backward()
            same = all(
                p.matrix.codes.tobytes() == q.matrix.codes.tobytes() and
                p.matrix.scale.tobytes() == q.matrix.scale.tobytes()
                for (_, p), (_, q) in zip(cut.packed_parts(), one.packed_parts(), strict=True)
            )
            found["packed"][f"{scheme}, {name}"] = [
                apart(a, b), apart(x.grad, y.grad), codes, same, cut.num_parameters() == one.num_parameters(),
                torch.equal(cut.generate(IDS, max_new_tokens=4), one.generate(IDS, max_new_tokens=4)),
            ]
        loaded.save_pretrained(folder + "-again")
        dist.barrier()
        if rank == 0:
            files = [open(os.path.join(f, "model.safetensors"), "rb").read() for f in (folder, folder + "-again")]
            found["packed"][f"{scheme}, {name}"].append(files[0] == files[1])
        dist.barrier()

    found["classes"] = {}
    for architecture in ("MistralModel", "MistralForSequenceClassification", "MistralForTokenClassification",
                         "MistralForQuestionAnswering"):
        one, cut = (model_of(CONFIG, m, architecture).eval() for m in (None, two))
        a, b = cut(IDS, MASK, use_cache=False), one(IDS, MASK, use_cache=False)
        found["classes"][architecture] = apart(a[0], b[0])

    one, cut = model_of(CONFIG), model_of(CONFIG)
    mesh = dist.init_device_mesh("cpu", (4,))  # torch's own functions, and axes without names
    for layer in cut.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(cut, mesh=mesh)
    texts = [model.generate(IDS[:, : 4 + rank], max_new_tokens=3 + rank) for model in (cut, one)]
    found["own fsdp"] = torch.equal(*texts)
    alone = fully_shard(model_of(CONFIG), mesh=mesh)  # as a whole: it stays gathered between calls
    again = [model.generate(IDS[:, : 4 + rank], max_new_tokens=3 + rank) for model in (alone, alone, one)]
    alone.save_pretrained(folder + "-whole")
    found["own fsdp, whole"] = torch.equal(again[0], again[2]) and torch.equal(again[1], again[2])
    cut.save_pretrained(folder + "-fsdp")
    saved, state = dict(load(folder + "-fsdp")[1]), one.state_dict()
    found["own fsdp saved"] = all(x.tobytes() == state[n].numpy().tobytes() for n, x in saved.items())
    cut.load_arrays({n: x.numpy() * 2 for n, x in one.state_dict().items()})
    found["set"] = furthest(cut.named_parameters(), [(n, 2 * p) for n, p in one.named_parameters()])

    text = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    streamed = [
        "".join(model.stream(IDS[:1, : 4 + rank], tokenizer=text, max_new_tokens=3 + rank))
        for model in (model_of(CONFIG, dist.init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))), model_of(CONFIG))
    ]
    found["streamed"] = streamed[0] == streamed[1] != ""

    # what torch.distributed.checkpoint writes of a run, for whoever goes on with it over another mesh
    run = model_of(CONFIG, two)
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-3)
    run(IDS, labels=IDS).loss.backward()
    optimizer.step()
    states = get_state_dict(run, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder + "-run")
    on = model_of(CONFIG.replace(num_hidden_layers=2), four)
    other = torch.optim.AdamW(on.parameters(), lr=1e-3)
    states = get_state_dict(on, other)
    dcp.load(both := {"model": states[0], "optimizer": states[1]}, checkpoint_id=folder + "-run")
    set_state_dict(on, other, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    found["gone on"] = furthest(on.named_parameters(), run.named_parameters())
    moments = [[whole(x) for p in m.parameters() for x in (o.state[p]["exp_avg"], o.state[p]["exp_avg_sq"])]
               for m, o in ((on, other), (run, optimizer))]
    found["moments"] = all(map(torch.equal, *moments))

    compiled = model_of(CONFIG, two)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    given = {"labels": LABELS, "use_cache": False}
    compiled.train()(IDS, MASK, **given).loss.backward()
    one.train()(IDS, MASK, **given).loss.backward()
    found["compiled"] = furthest(gradients(compiled), gradients(one))

    # a caller that has enough, and one whose function fails, in one process of four that compute the same rows
    cut = model_of(CONFIG, four).eval()

    class Streamer:
        seen = 0

        def put(self, column):
            self.seen += 1
            if self.seen == 4 and self.fails:
                raise OSError("closed")
            return self.seen == 4

        def end(self):
            pass

    for fails in (False, True):
        streamer = Streamer() if rank == 2 else None
        if streamer:
            streamer.fails = fails
        try:
            tokens = cut.generate(IDS, max_new_tokens=30, streamer=streamer).shape[1]
        except OSError:
            tokens = "OSError"
        found["fails" if fails else "enough"] = tokens
    found["time"] = cut.generate(IDS, max_new_tokens=60, max_time=1e-9 if rank == 1 else 60.0).shape[1]

    names = lambda sizes, names: dist.init_device_mesh("cpu", sizes, mesh_dim_names=names)
    found["errors"] = {
        "names": raised(parallelize, model_of(CONFIG), names((4,), ("x",))),
        "no names": raised(parallelize, model_of(CONFIG), mesh),
        "order": raised(parallelize, model_of(CONFIG), names((2, 2), ("tensor", "fsdp"))),
        "data": raised(parallelize, model_of(CONFIG), names((4,), ("data",))),
        "heads": raised(parallelize, model_of(CONFIG.replace(num_attention_heads=6, num_key_value_heads=6)), four),
        "packed": raised(parallelize, quantize(model_of(CONFIG), "int8"), two),
        "packed file": raised(MistralForCausalLM.from_pretrained, folder, mesh=two),
        "groups": raised(
            parallelize, quantize(model_of(CONFIG.replace(intermediate_size=48)), "int4", group_size=16), four
        ),
        "wrapped": raised(parallelize, wrapped(model_of(CONFIG)), four),
        "dequantize": raised(mistral_torch.dequantize, cut),
        "resize": raised(cut.resize_token_embeddings, 99),
        "push": raised(cut.push_to_hub, "a/b"),
        "assistant": raised(model_of(CONFIG).generate, IDS, max_new_tokens=2, assistant_model=model_of(CONFIG, two)),
    }
    untouched = wrapped(model_of(CONFIG))
    raised(parallelize, untouched, four)
    found["untouched"] = {type(module).__name__ for module in untouched.modules() if "Sharded" in type(module).__name__}
    found["untouched"] = sorted(found["untouched"]), untouched.placement is None
    blocked = os.path.join(FOLDER, "blocked")
    if rank == 0:
        open(blocked, "w").close()  # a file where the directory is to be
    dist.barrier()
    found["blocked"] = raised(cut.save_pretrained, blocked)
    found["first"] = Together.of(cut).is_first
    return found


def wrapped(model):
    class Mine(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Mine(64, 128, bias=False)
    return model


def process(rank, world, port, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    found = {name: looked_at(name, **case) for name, case in cases.items()}
    found["others"] = others()
    with open(os.path.join(FOLDER, f"found{rank}.json"), "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def launched(world, port, run):
    "Processes that are copies of this one, which has loaded torch; if one fails all end."
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(rank)
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks[pid] = rank
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.pop(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, 9)
    return failed


if __name__ == "__main__":
    port, cases = int(sys.argv[2]), json.load(sys.stdin)
    sys.exit(launched(4, port, lambda rank: process(rank, 4, port, cases)))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(program, folder, given="", *, seconds=300):
    """A program in a process of its own, and what it wrote; killed with all its children after so many seconds."""
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(folder), str(free_port())], stdin=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        _, errors = started.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, 9)
        _, errors = started.communicate()
        pytest.fail(f"it has not ended after {seconds} s: {errors[-3000:]}")
    return started.returncode, errors


@pytest.fixture(scope="module")
def found(tmp_path_factory, asked_for):
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("processes")
    code, errors = run(PROGRAM, folder, json.dumps(asked_for(CASES)))
    assert code == 0, errors[-6000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(4)]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in FURTHER else ()) for name in CASES])
def each(request, found):
    """A case, and what each of four processes found of it."""
    return CASES[request.param], [of_rank[request.param] for of_rank in found]


def test_parameters_are_cut_and_nothing_large_is_whole(each):
    case, of_ranks = each
    copies = case["sizes"].get("data", 1)
    repeated = case["K"] < case["sizes"].get("tensor", 1)
    for found in of_ranks:
        assert found["kinds"] == ["DTensor"], "what clips and saves looks for them"
        assert found["large"] == copies
        # but for norms, which are whole over tensor, and repeated key/value heads
        assert found["numbers"] <= copies / 4 * (1.25 if repeated else 1.01)
        assert found["cache"] == [max(1, case["K"] // case["sizes"].get("tensor", 1))] * 2


def test_a_process_holds_what_the_plan_says(each):
    case, of_ranks = each
    config = TINY.replace(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=case["K"],
        head_dim=16, num_hidden_layers=2, tie_word_embeddings=case.get("tied", False),
    )  # fmt: skip
    planned = plan(config, case["sizes"], dtype="float32").parameters
    assert [found["bytes"] for found in of_ranks] == [planned] * 4


def test_a_call_is_that_of_one_process(each):
    for found in each[1]:
        assert found["logits"] < 2e-6, "9e-7 seen"
        assert found["hidden"] < 3e-6, "1.3e-6 seen"
        assert found["attentions"] < 3e-6, "1.6e-6 seen"


def test_a_step_is_that_of_one_process_though_labels_are_uneven(each):
    for found in each[1]:
        assert found["loss"] < 3e-7, "9e-8 seen"
        assert found["gradients"] < 5e-6, "2.5e-6 seen"
        assert found["checkpointed"] < 5e-6
        assert found["like"] == [], "gradients are cut as their parameters are"
        assert found["norm"] < 5e-7, "2.1e-7 seen"
        assert found["clipped"] < 5e-6
        assert found["stepped"] < 5e-5, "2.2e-5 seen"


def test_texts_are_those_of_one_process(each):
    case, of_ranks = each
    for found in of_ranks:
        assert found["texts"] == dict.fromkeys(found["texts"], True)
        assert len(found["texts"]) == (8 if case.get("all_ways") else 2)
        assert found["looked into"] == [8, 3], "all heads, each step"
        assert found["compile"].startswith("UnsupportedFeatureError: compile='on': a model that is cut over processes")
        assert found["again"]


def test_files_have_the_bits_of_the_parts(each):
    case, of_ranks = each
    for found in of_ranks:
        assert found["saved"]
        assert found["loaded"]
        assert found["tied"] == case.get("tied", False)
        assert found["dtype"] == ["torch.bfloat16"]


def test_packed_matrices_are_cut(found):
    for of_rank in found:
        for name, (logits, gradients, codes, bits, count, text, *file) in of_rank["others"]["packed"].items():
            assert logits < 1e-6, f"{name}: 4e-7 seen"
            assert gradients < 2e-6, f"{name}: 8e-7 seen"
            assert codes < 0.29, f"{name}: a part and the repeated heads"
            assert (bits, count, text) == (True, True, True), name
            assert all(file), name


@pytest.fixture
def others(found):
    """What each of four processes found beside the cases."""
    return [of_rank["others"] for of_rank in found]


def test_every_class_is_cut(others):
    for found in others:
        assert len(found["classes"]) == 4
        assert max(found["classes"].values()) < 2e-6, "9e-7 seen"


def test_a_model_that_torch_s_own_functions_cut(others):
    for found in others:
        assert found["own fsdp"], "texts of other lengths in each process"
        assert found["own fsdp, whole"], "also where nothing is cut between calls"
        assert found["own fsdp saved"]
        assert found["streamed"], "a text of another length in each process"
        assert found["set"] == 0
        assert found["compiled"] < 5e-6


def test_a_run_goes_on_over_another_mesh(others):
    for found in others:
        assert found["gone on"] == 0
        assert found["moments"]


def test_processes_that_compute_the_same_rows_end_together(others):
    assert [found["enough"] for found in others] == [12, 12, 12, 12]
    assert [found["fails"] for found in others] == [12, 12, "OSError", 12]
    assert [found["time"] for found in others] == [10, 10, 10, 10]


@pytest.mark.parametrize(
    ("name", "told"),
    {
        "names": "MeshError: mesh must have axes named data, fsdp, tensor, some of them and in this order, got x;",
        "no names": "MeshError: mesh must have axes named data, fsdp, tensor, some of them and in this order, got no ",
        "order": "MeshError: mesh must have axes named data, fsdp, tensor, some of them and in this order, got tensor",
        "data": "MeshError: mesh: beside an axis data there must be one fsdp, got data;",
        "heads": "MeshError: mesh must divide what it cuts, got tensor=4, which cuts N=6 (query heads) by 4",
        "packed": "UnsupportedFeatureError: model.layers.0.self_attn.q_proj.weight: FSDP2 cuts floats alone",
        "packed file": "UnsupportedFeatureError: model.layers.",
        "groups": "MeshError: model.layers.0.mlp.down_proj.weight: columns 12 to 24 of a packed matrix must begin and ",
        "wrapped": "UnsupportedFeatureError: parallelize: model.layers.0.mlp.up_proj must be a module that models ",
        "dequantize": "UnsupportedFeatureError: dequantize: this model is cut over processes;",
        "resize": "UnsupportedFeatureError: resize_token_embeddings: resize the model before it is cut",
        "push": "UnsupportedFeatureError: push_to_hub: several processes hold this model;",
        "assistant": "UnsupportedFeatureError: assistant_model: FSDP2 cuts it",
    }.items(),
)
def test_what_cannot_be_cut_is_refused(others, name, told):
    for found in others:
        assert found["errors"][name].startswith(told)


def test_a_refused_model_is_as_it_was(others):
    assert all(found["untouched"] == [[], True] for found in others)


def test_where_the_first_process_cannot_write_all_end_with_an_error(others):
    first, *rest = others
    assert [found["first"] for found in others] == [True, False, False, False]
    assert "must be a directory, got a file" in first["blocked"]
    assert {found["blocked"] for found in rest} == {
        "ConversionError: save: the first process could not write, and says why."
    }


LOST = (
    PROGRAM.partition('if __name__ == "__main__":')[0]
    + r"""
from mistral_core.weights import loading


def lost(rank, port, how):
    "Process 1 dies in the middle; what process 0 raises within the time that the group waits is written down."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=20))
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tensor" if how == "generating" else "fsdp",))
    folder, calls = os.path.join(FOLDER, "checkpoint"), 0
    if rank == 0:
        model_of(CONFIG).save_pretrained(folder)
    dist.barrier()

    def dies(function):
        def run(*given, **options):
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 3:
                os._exit(9)
            return function(*given, **options)
        return run

    model = model_of(CONFIG, mesh)
    parts = (MistralForCausalLM, "_set_part") if how == "loading" else (MistralForCausalLM, "_array")
    setattr(*parts, dies(getattr(*parts)))
    started = time.monotonic()
    try:
        if how == "training":
            step = dies(lambda: model.train()(IDS, labels=IDS).loss.backward())
            for _ in range(5):
                step()
        elif how == "generating":
            streamer = type("Dies", (), {"put": dies(lambda *_: None), "end": int})
            model.generate(IDS, max_new_tokens=40, streamer=streamer())
        elif how == "loading":
            MistralForCausalLM.from_pretrained(folder, mesh=mesh).save_pretrained(folder + "-after")
        else:
            model.save_pretrained(folder)
        error = "nothing"
    except Exception as raised:
        error = type(raised).__name__
    arrays = dict(load(folder, verify="full")[1])
    whole = all(x.tobytes() == model_of(CONFIG).state_dict()[n].numpy().tobytes() for n, x in arrays.items())
    names = sorted(os.listdir(FOLDER))
    with open(os.path.join(FOLDER, f"{how}.json"), "w") as file:
        json.dump([error, time.monotonic() - started, whole, names], file)


if __name__ == "__main__":
    port, how = int(sys.argv[2]), sys.stdin.read()
    first = os.fork()
    if first == 0:
        lost(0, port, how)
        os._exit(0)
    second = os.fork()
    if second == 0:
        lost(1, port, how)
        os._exit(7)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (second, first)]
    sys.exit(0 if codes == [9, 0] else f"exit statuses {codes}")
"""
)


@pytest.mark.parametrize(
    "how", ["saving", *(pytest.param(how, marks=pytest.mark.sweep) for how in ("training", "generating", "loading"))]
)
def test_where_a_process_dies_the_other_ends_with_an_error_and_files_are_whole(tmp_path, how):
    code, errors = run(LOST, tmp_path, how, seconds=120)
    assert code == 0, errors[-3000:]
    error, seconds, whole, names = json.loads((tmp_path / f"{how}.json").read_text())
    assert error != "nothing"
    assert seconds < 60
    assert whole
    assert [name for name in names if not name.endswith(".lock")] == ["checkpoint"]


def launched(tmp_path, *command):
    """What a launcher's processes print together."""
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.sweep
@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_of_the_example(tmp_path, processes):
    example = ROOT / "examples" / "torchrun_fsdp.py"
    port = ["--master-port", str(free_port())]
    printed = launched(tmp_path, "torch.distributed.run", "--nproc-per-node", str(processes), *port, str(example))
    assert "after: Emma was reading about attention masks." in printed
    assert sum(line.startswith("after:") for line in printed.splitlines()) == 1
    assert (tmp_path / "tuned" / "model.safetensors").exists()


@pytest.mark.sweep
def test_accelerate_launch_of_its_page(tmp_path):
    pytest.importorskip("accelerate")
    page = (ROOT / "docs" / "launchers" / "accelerate.md").read_text()
    (tmp_path / "train.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    port = ["--main_process_port", str(free_port())]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", *port, "train.py"]
    assert launched(tmp_path, *launch).strip() == "Emma was reading about attention masks"
    assert (tmp_path / "tuned" / "model.safetensors").exists()
