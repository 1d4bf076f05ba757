"""The Triton kernels, nothing else. Importing one of these modules imports Triton.

In names: ``i_`` program ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` register blocks.
"""
