"""InAttention: every layer attends to the initial embeddings of the tokens, and to nothing else.

    x0_j = E[token_j] (+ a P[j])        j counted from the start of the document
    m_j  = x0_j / rms(x0_j) (W_down)    the memory, once for all layers
    h <- x0;   per layer:  h += attention(norm h, m);  h += MLP(norm h)

| equation | file |
| --- | --- |
| m, and the layers that read it | `layers.py`, `nn/inattention/rows.py` |
| attention to m; its exact ways to go on | `nn/inattention/{attention,forms}.py` |
| what is remembered: rows, ids, counts, keys | `nn/inattention/memory.py` |
| which of them | `cache.py` |
| the family's functions, `Body` | `body.py` |
| fields | `config.py` |

Source: Eisner (2024), arXiv 2410.07063. What the paper's abstract leaves open (positions, own
projections, normalisation) is config.model.inattention.
"""
