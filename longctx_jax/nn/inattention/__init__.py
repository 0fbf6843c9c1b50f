"""Modules of InAttention: attention to initial embeddings, its forms, and what is remembered.

    k_j = (g * m_j) W_K,   v_j = (g * m_j) W_V       m_j: normed embedding of token j, of all layers
    out_i = sum_j softmax_j(q_i . k_j / sqrt(K) + bias(i - j)) v_j,   j <= i

`models/inattention/__init__.py` has the table of equations and files.
"""
