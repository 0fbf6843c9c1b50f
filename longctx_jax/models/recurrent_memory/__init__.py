"""Recurrent memory: segments of attention, and a memory of constant size between them.

`memory.kind`: "armt" (an associative matrix a layer), "layerwise" (memory tokens a layer) or "rmt"
(memory tokens through the whole model). With segment s, layer l, text rows X, memory rows M:

    ARMT        X <- X + A[l] phi(W_q X) / (z[l] . phi(W_q X))        read, in front of the block
                [X'; M'] = block_l([X; M])
                A[l], z[l] <- delta rule of keys W_k M', values W_v M', gates sigma(W_beta M')
    layer-wise  [_; X'; M'] = block_l([M[l]; X; M[l]]),  M[l] <- M'
    RMT         [_; Y; M'] = stack([M; X; M]),           M <- M'      one segment after another

| equation | file |
| --- | --- |
| what one layer does with a segment, or a part of one | `cells.py` |
| read and write of A and z | `nn/memory.py`, `ops/memory/` |
| a call cut into segments; RMT's loop | `segments.py` |
| parameters, caches, the unfinished segment | `state.py` |
| the family's functions, `Body` | `body.py` |
| fields | `config.py` |

Source: Bulatov et al. (2022), arXiv 2207.06881 (RMT); Rodkin et al. (2024), arXiv 2407.04841 (ARMT
and layer-wise tokens); Sivtsov et al. (2025), arXiv 2506.05229 (the family, and its schedule).
"""
