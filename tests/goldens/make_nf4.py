"""NF4 with double quantisation as bitsandbytes does it: writes nf4.safetensors beside this file.

pip install torch bitsandbytes==0.50.2 safetensors; python make_nf4.py
"""

import pathlib

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
# Blocks of very different size, a block of zeros, and enough blocks for two groups of scales.
weight = torch.randn(96, 256) * torch.logspace(-3, 0, 96)[:, None]
weight[7, 64:128] = 0
packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
back = bnb.dequantize_4bit(packed, state)
folder = pathlib.Path(__file__).parent
save_file({"weight": weight, "dequantised": back.to(torch.float32).contiguous()}, folder / "nf4.safetensors")
print(packed.shape, state.offset, (back - weight).abs().max())
