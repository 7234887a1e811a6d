"""Matrices rounded to few bits by the libraries in whose formats they are saved: bitsandbytes, compressed-tensors.

Run in this directory by an interpreter with bitsandbytes 0.50.2, compressed-tensors 0.20.0 and torch 2.13.0, which made
the file that lies here, and without `kernels`, which bitsandbytes would ask for others' code. Each tensor of
rounded.safetensors is "case/what". Of compressed-tensors it is what calculate_qparams, quantize and compress give for
the least and the largest number of each group.
"""

from pathlib import Path

import bitsandbytes.functional
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

ROWS, COLUMNS = 9, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plain():
    return np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32) / 8


def odd():
    """Blocks of zeros, one value far from the others, halves of a step, numbers that are next to nothing, one sign."""
    w = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    w[0] = 0
    w[1, ::2], w[1, 5] = 0, 6e4
    w[2] = np.arange(COLUMNS) % 31 / 2 - 7.5  # scale 1 by rows of 4 bits: every other one is a half
    w[3] = 2 * np.arange(COLUMNS) - 63.5
    w[4] *= 1e-7
    w[5] *= 1e-42
    w[6], w[7] = np.abs(w[6]), -np.abs(w[7])
    w[8, :32], w[8, 32:] = 0, 1
    return w


def four_bit_floats(name, w, found):
    quantised, state = bitsandbytes.functional.quantize_4bit(w, blocksize=32, quant_type="nf4")
    dense = bitsandbytes.functional.dequantize_4bit(quantised, state)
    found |= {f"{name}/bytes": quantised, f"{name}/absmax": state.absmax, f"{name}/dense": dense}


def integers(name, w, bits, group, symmetric, found):
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = w.reshape(len(w), -1, group or w.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    state = {"weight": w, "weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero})
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(dict(state), scheme)
    dense = BaseCompressor.get_value_from_registry("pack-quantized").decompress(dict(packed), scheme)["weight"]
    found |= {f"{name}/{part}": tensor for part, tensor in packed.items() if part != "weight_shape"}
    if w.dtype == torch.float32:
        found[f"{name}/dense"] = dense
    else:  # what it gives where it does not round quotients to the dtype before it rounds them to integers
        zero = None if symmetric else zero
        found[f"{name}/codes"] = quantize(w.float(), scale.float(), zero, arguments, dtype=torch.int8)


def main():
    found = {}
    for matrix in (plain, odd):
        for dtype, kind in DTYPES.items():
            w = torch.from_numpy(matrix()).to(kind)
            of = f"{matrix.__name__} {dtype}"
            found[f"{of}/matrix"] = w
            four_bit_floats(f"{of} nf4", w, found)
            for bits in (4, 8):
                for group in (32, None):
                    for symmetric in (True, False):
                        name = f"{of} int{bits} {group or 'row'} {'symmetric' if symmetric else 'asymmetric'}"
                        integers(name, w, bits, group, symmetric, found)
    # so many scales that they are doubled in more than one block, and an odd number of them in the last
    w = torch.from_numpy(np.random.default_rng(2).normal(size=(67, 576)).astype(np.float32))
    blocks = w.reshape(-1, 64).abs().amax(-1)
    nested = bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    absmax = bitsandbytes.functional.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    found["nested values"] = nested.state2.code
    found |= {"many/scales": blocks, "many/nested": absmax, "many/offset": nested.offset}
    found = {name: tensor.clone().contiguous() for name, tensor in found.items()}
    save_file(found, Path(__file__).parent / "rounded.safetensors")


if __name__ == "__main__":
    main()
