"""Memory tokens between segments: the recurrent memory transformer, and one set a layer.

Bulatov et al. (2022), arXiv 2207.06881, section 3 (RMT), with the plain causal mask and positions
0, 1, ... of the public wrapper for pretrained decoders; Rodkin et al. (2024), arXiv 2407.04841,
appendix F.2 (layer-wise tokens, without the aliasing of the public code, whose layers overwrite
each other's memory).

    RMT         [mem_s ; tokens ; mem_s] -> all layers, final norm -> the last M rows are mem_{s+1}
    layer-wise  [mem_{s,l} ; x ; mem_{s,l}] -> layer l -> the last M rows are mem_{s+1,l}
"""

import numpy as np

from tests.golden.equations import common
from tests.golden.equations.armt import attention


def layer(p, x, c):
    x = x + attention(p["mixer"], common.norm(p["mixer_norm"], x, c), c)
    return x + common.mlp(p["mlp"], common.norm(p["mlp_norm"], x, c), c)


def segments(params, tokens, c):
    for start in range(0, len(tokens), c["memory"]["segment_len"]):
        yield common.embedding(params, tokens[start : start + c["memory"]["segment_len"]], c)


def language_model(variables, tokens, c, sg):
    """Logits [tokens, vocab] of RMT."""
    del sg
    params, m = variables["params"], c["memory"]["n_memory_tokens"]
    memory, out = params["memory"]["tokens"], []
    for x in segments(params, tokens, c):
        x = np.concatenate([memory, x, memory])
        for l in range(c["n_layers"]):
            x = layer(common.of_layer(params["stack"]["0_softmax"], l), x, c)
        out.append(x[m:-m])
        memory = common.norm(params["norm"], x[-m:], c)
    return common.logits(params, np.concatenate(out), c)


def layerwise(variables, tokens, c, sg):
    """Logits [tokens, vocab] with memory tokens of each layer's own."""
    del sg
    params, m = variables["params"], c["memory"]["n_memory_tokens"]
    memory = list(params["memory"]["layers"]["0_softmax"]["tokens"])
    out = []
    for x in segments(params, tokens, c):
        for l in range(c["n_layers"]):
            rows = np.concatenate([memory[l], x, memory[l]])
            rows = layer(common.of_layer(params["stack"]["0_softmax"], l), rows, c)
            x, memory[l] = rows[m:-m], rows[-m:]
        out.append(x)
    return common.logits(params, np.concatenate(out), c)
