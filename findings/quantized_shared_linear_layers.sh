#!/usr/bin/env bash
# torch 2.14.1, torch.onnx.export(dynamo=True), with onnxruntime 1.32.0, quantize_dynamic.
#
# Expected: a linear layer is stored with weights of 8 bits, a quarter of the size, whether it is used
# once or twice.
# Seen: used once, it is. Used twice, the exporter keeps the weight as it is and puts one Transpose
# before both products; quantize_dynamic then takes no product for one with a constant weight and
# leaves both in float32. The file has its old size; there is no error, and no more than the advice
# to pre-process that it logs for either file. Taken, the advice helps: quant_pre_process computes the
# Transpose, and both products are quantized.
# Why it matters here: the scales of RAMS-Trans share one encoder, so nearly every layer is used more
# than once: quantized without that step, the file stays as large and as slow as before. Compare the
# sizes of the files, or count MatMulInteger, before believing in a quantized model.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import os
from collections import Counter

import onnx
import torch
from onnxruntime.quantization import quant_pre_process, quantize_dynamic
from torch import nn

logging.disable(logging.WARNING)


class Repeated(nn.Module):
    """One linear layer, applied a number of times."""

    def __init__(self, times):
        super().__init__()
        self.layer, self.times = nn.Linear(384, 384), times

    def forward(self, tokens):
        for _ in range(self.times):
            tokens = self.layer(tokens)
        return tokens


shares = {}
for times in (1, 2):
    tokens, file = torch.randn(2, 16, 384), f"{times}.onnx"
    options = {"dynamo": True, "verbose": False, "external_data": False}
    torch.onnx.export(Repeated(times).eval(), (tokens,), file, **options)
    quantize_dynamic(file, f"8-{file}")
    shares[times] = os.path.getsize(f"8-{file}") / os.path.getsize(file)
    kinds = Counter(node.op_type for node in onnx.load(f"8-{file}").graph.node)
    print(f"used {times} x: {shares[times]:.2f} of its size,", dict(kinds))
    assert kinds["MatMulInteger"] == (1 if times == 1 else 0)
assert shares[1] < 0.3 and shares[2] > 0.99
quant_pre_process("2.onnx", "prepared.onnx", skip_symbolic_shape=True)
quantize_dynamic("prepared.onnx", "8-prepared.onnx")
kinds = Counter(node.op_type for node in onnx.load("8-prepared.onnx").graph.node)
print("used 2 x, pre-processed:", dict(kinds))
assert kinds["MatMulInteger"] == 2
PYTHON
